"""Data sets made from another: restricted views, shuffled controls, prompts with retrieved history."""
