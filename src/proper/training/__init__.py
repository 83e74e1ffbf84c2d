"""Training of the three LoRA stages: population, groups, users."""
