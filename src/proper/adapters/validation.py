"""Whether the numbers of an adapter or an embedding can take part in an answer: finite, and of a size training makes.

One NaN is an answer of nothing but NaNs, and numbers far beyond what training makes overflow to that a few layers
later. Asked when a record is taken in, stored and loaded. Knows nothing about where the numbers come from.
"""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from proper.errors import StoreError

LARGEST = 1e4
"""Trained adapters and embeddings stay below 1e2."""

_SCALE = ":scale"  # of an int8 tensor, whose numbers reach 127 times it; see `quantize`
_LEVELS = 127


def is_sound(tensor: Tensor, largest: float = LARGEST) -> bool:
    """Whether all numbers are finite and none is beyond `largest` in size."""
    if not tensor.numel():
        return True
    low, high = tensor.aminmax()
    # False for NaNs too, which `aminmax` passes on.
    return bool((low >= -largest) & (high <= largest))


def fault_of(tensors: Mapping[str, Tensor]) -> str | None:
    """Return what is wrong with the first tensor that is not sound, in words that begin with its name; None if none is.

    int8 tensors are judged by their scales.
    """
    for name, tensor in tensors.items():
        if not is_sound(tensor, LARGEST / _LEVELS if name.endswith(_SCALE) else LARGEST):
            finite = bool(tensor.isfinite().all())
            return f"{name}: {f'numbers beyond {LARGEST:g}' if finite else 'numbers that are not finite'}"
    return None


def require_sound(user: str, tensors: Mapping[str, Tensor]) -> None:
    """See that all tensors of a user are sound.

    Raises:
        StoreError: one is not; names user and tensor.
    """
    fault = fault_of(tensors)
    if fault is not None:
        raise StoreError(f"user {user!r}: {fault}")
