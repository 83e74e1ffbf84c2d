"""PyTorch layers of the method: LoRA bank, LoRA experts, routers and routing losses. Imports torch only."""
