"""Symmetric int8 quantization of LoRA adapters, with one bf16 scale per row.

A row runs along the last axis: the inputs of one rank of A, the ranks of one output of B. Scales are bf16, which has
the range of fp32 (an fp16 scale of a barely trained B underflows), and are rounded up, so that no number is
clipped: |x - q s| <= s / 2.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

import torch
from jaxtyping import BFloat16, Float, Int8
from torch import Tensor

Storage = Literal["bf16", "fp32", "int8"]
_SCALE = ":scale"
_MOST = 127


def quantize(x: Float[Tensor, "*rows N"]) -> tuple[Int8[Tensor, "*rows N"], BFloat16[Tensor, "*rows"]]:
    """Return q and s with x ~ q s.

    Raises:
        ValueError: a number is not finite.
    """
    if not torch.isfinite(x).all():
        raise ValueError("numbers that are not finite have no place in 8 bits")
    least = x.float().abs().amax(-1) / _MOST
    scale = least.bfloat16()
    scale = torch.where(scale.float() < least, torch.nextafter(scale, torch.full_like(scale, torch.inf)), scale)
    divisor = torch.where(scale > 0, scale.float(), 1.0)
    return (x.float() / divisor.unsqueeze(-1)).round().clamp(-_MOST, _MOST).to(torch.int8), scale


def dequantize(q: Int8[Tensor, "*rows N"], scale: BFloat16[Tensor, "*rows"]) -> Float[Tensor, "*rows N"]:
    """Return q s in fp32, which holds the products exactly."""
    return q.float() * scale.float().unsqueeze(-1)


def encode(adapter: Mapping[str, Tensor], storage: Storage) -> dict[str, Tensor]:
    """Return an adapter in its storage form; int8 tensors come with their scales as `NAME:scale`.

    Raises:
        ValueError: the storage is int8 and a number is not finite; names the tensor.
    """
    if storage != "int8":
        kept = torch.bfloat16 if storage == "bf16" else torch.float32
        return {name: tensor.to(kept) for name, tensor in adapter.items()}
    coded: dict[str, Tensor] = {}
    for name, tensor in adapter.items():
        try:
            coded[name], coded[name + _SCALE] = quantize(tensor)
        except ValueError as error:
            raise ValueError(f"{name}: {error}") from error
    return coded


def decode(stored: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return an adapter ready for computation: int8 tensors dequantized to fp32, all others unchanged."""
    tensors: dict[str, Tensor] = {}
    for name, tensor in stored.items():
        if not name.endswith(_SCALE):
            scale = stored.get(name + _SCALE)
            tensors[name] = tensor if scale is None else dequantize(tensor, scale)
    return tensors
