"""Pure tensors: adapters, mixtures of experts, routers and the constraint. Imports torch only."""
