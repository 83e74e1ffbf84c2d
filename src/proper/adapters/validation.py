"""Validation of adapter and embedding tensors: all numbers finite, and of a magnitude that training produces.

One NaN makes the whole output NaN, and numbers far beyond what training produces overflow to NaN a few layers later.
Records are validated when they are imported, stored and loaded.
"""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from proper.errors import StoreError

LARGEST = 1e4
"""Trained adapters and embeddings stay below 1e2."""

_SCALE = ":scale"  # suffix of an int8 tensor's scales; its numbers reach 127 times the scale, see `quantization`
_LEVELS = 127


def is_sound(tensor: Tensor, largest: float = LARGEST) -> bool:
    """Return whether all numbers are finite and none exceeds `largest` in magnitude."""
    if not tensor.numel():
        return True
    low, high = tensor.aminmax()
    # False for NaNs too, which `aminmax` passes on.
    return bool((low >= -largest) & (high <= largest))


def fault_of(tensors: Mapping[str, Tensor]) -> str | None:
    """Return a description of the first unsound tensor, beginning with its name; None if all are sound.

    int8 tensors are checked by their scales.
    """
    for name, tensor in tensors.items():
        if not is_sound(tensor, LARGEST / _LEVELS if name.endswith(_SCALE) else LARGEST):
            finite = bool(tensor.isfinite().all())
            return f"{name}: {f'numbers beyond {LARGEST:g}' if finite else 'numbers that are not finite'}"
    return None


def require_sound(user: str, tensors: Mapping[str, Tensor]) -> None:
    """Require that all tensors of a user are sound.

    Raises:
        StoreError: a tensor is not; names user and tensor.
    """
    fault = fault_of(tensors)
    if fault is not None:
        raise StoreError(f"user {user!r}: {fault}")
