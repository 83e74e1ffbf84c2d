"""HTTP routes, one module per resource: generation, users, interactions, health, the playground page."""
