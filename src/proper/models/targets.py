"""Which layers of a backbone are adapted, found by the names that model families use.

Knows nothing about what is put there.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

from torch import nn
from transformers.pytorch_utils import Conv1D

from proper.errors import ConfigError

# A layer belongs to the FFN (or attention) if a part of its path says so; OPT and some Phi models name only the leaf.
_FFN = re.compile(r"(^|[._])(mlp|ffn|feed_forward|fc1|fc2)($|[._])")
_ATTENTION = re.compile(r"(^|[._])(attn|attention)($|[._])")


def linear_shape(module: nn.Module) -> tuple[int, int] | None:
    """Return (inputs, outputs) of a linear layer of any kind (dense, quantized, Conv1D, with a LoRA), else None."""
    if isinstance(module, Conv1D):
        return int(module.weight.shape[0]), int(module.nf)
    inputs, outputs = getattr(module, "in_features", None), getattr(module, "out_features", None)
    if isinstance(inputs, int) and isinstance(outputs, int):
        return inputs, outputs
    return None


def find_targets(model: nn.Module, wanted: str | Sequence[str]) -> dict[str, tuple[int, int]]:
    """Return the adapted modules as name -> (inputs, outputs), in the model's order.

    Args:
        model: the backbone.
        wanted: "ffn" (also "auto"), "attention", "all" (both), or names: a module is meant by its full name, its last
            part, or any dotted ending.

    Raises:
        ConfigError: nothing matches.
    """
    found: dict[str, tuple[int, int]] = {}
    for name, module in model.named_modules():
        shape = linear_shape(module)
        inside = any(name.startswith(f"{outer}.") for outer in found)
        if shape is not None and not inside and re.search(r"\.\d+\.", name) and _is_wanted(name, wanted):
            found[name] = shape
    if not found:
        raise ConfigError(f"target_modules: nothing in {type(model).__name__} matches {wanted!r}")
    return found


def _is_wanted(name: str, wanted: str | Sequence[str]) -> bool:
    if not isinstance(wanted, str):
        return any(name == ending or name.endswith(f".{ending}") for ending in wanted)
    ffn, attention = bool(_FFN.search(name)), bool(_ATTENTION.search(name))
    return {"ffn": ffn, "auto": ffn, "attention": attention, "all": ffn or attention}[wanted]
