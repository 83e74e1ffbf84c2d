"""The three stages: population, groups, users."""
