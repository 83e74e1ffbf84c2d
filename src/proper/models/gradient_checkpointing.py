"""Gradient checkpointing of a backbone with adapted layers: activations are computed again in the backward pass."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn

from proper.layers.batch_context import BatchContext
from proper.layers.personalized_linear import AdaptedLinear


@contextmanager
def gradient_checkpointing(model: nn.Module, on: bool) -> Iterator[None]:
    """Enable gradient checkpointing inside the block: activations are recomputed in the backward pass."""
    if not on:
        yield
        return
    training = {name for name, module in model.named_modules() if module.training}
    routing = next((module.routing for module in model.modules() if isinstance(module, AdaptedLinear)), BatchContext())
    # transformers is renaming these two methods.
    kind = "activation" if hasattr(model, "activation_checkpointing_enable") else "gradient"
    getattr(model, f"{kind}_checkpointing_enable")({"use_reentrant": False, "context_fn": routing.contexts})
    # transformers checkpoints only modules in training mode, where OPT's would also apply dropout: rates are set to 0.
    layers = [module for module in model.modules() if hasattr(module, "gradient_checkpointing")]
    rates = [(m, key, p) for m in layers for key, p in vars(m).items() if "drop" in key and isinstance(p, float)]
    for module in layers:
        module.training = True
    for module, key, _ in rates:
        setattr(module, key, 0.0)
    try:
        yield
    finally:
        getattr(model, f"{kind}_checkpointing_disable")()
        model.disable_input_require_grads()  # type: ignore[operator]
        for name, module in model.named_modules():
            module.training = name in training
        for module, key, rate in rates:
            setattr(module, key, rate)
