"""Derived datasets: restricted views, shuffled controls, and prompts augmented with retrieved history or profiles."""
