"""Benchmarks of speed and memory: plain functions that return figures; each runs all its sides in one process."""
