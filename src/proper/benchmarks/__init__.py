"""Speed and memory, never quality: plain functions that return figures. Each runs all its sides in one process."""
