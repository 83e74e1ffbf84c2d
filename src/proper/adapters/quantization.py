"""Symmetric int8 and int4 quantization of adapters, with one bf16 scale per block of consecutive numbers.

    int8   a block is a row: the inputs of one rank of A, the ranks of one output of B; of a core C, all R x R numbers
    int4   a block is `BLOCK` numbers of one layer's tensor, or all of them if that does not divide; two numbers a byte

Scales are bf16, which has the range of fp32 (an fp16 scale of a barely trained B underflows), and are rounded up, so
that no number is clipped: |x - q s| <= s / 2.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

import torch
from jaxtyping import BFloat16, Float, Int8, UInt8
from torch import Tensor

from proper.adapters.serialization import MAX_LEVEL, SCALE

Storage = Literal["bf16", "fp32", "int8", "int4"]
BLOCK = 32
"""Numbers that share a scale in int4."""


def quantize(x: Float[Tensor, "*rows N"], most: int = 127) -> tuple[Int8[Tensor, "*rows N"], BFloat16[Tensor, "*rows"]]:
    """Return q, between -`most` and `most`, and s with x ~ q s.

    Raises:
        ValueError: a number is not finite.
    """
    if not torch.isfinite(x).all():
        raise ValueError("numbers that are not finite cannot be quantized")
    least = x.float().abs().amax(-1) / most
    scale = least.bfloat16()
    scale = torch.where(scale.float() < least, torch.nextafter(scale, torch.full_like(scale, torch.inf)), scale)
    divisor = torch.where(scale > 0, scale.float(), 1.0)
    return (x.float() / divisor.unsqueeze(-1)).round().clamp(-most, most).to(torch.int8), scale


def dequantize(q: Int8[Tensor, "*shape"], scale: BFloat16[Tensor, "*blocks"]) -> Float[Tensor, "*shape"]:
    """Return q s in fp32, which holds the products exactly; the scales are for equal parts of q's numbers, in order."""
    if not q.numel():
        return q.float()
    return (q.reshape(scale.numel(), -1).float() * scale.reshape(-1, 1).float()).view(q.shape)


def encode(adapter: Mapping[str, Tensor], storage: Storage) -> dict[str, Tensor]:
    """Return an adapter in its storage form; tensors of int8 and int4 come with their scales as `NAME:scale`.

    Raises:
        ValueError: the storage is int8 or int4 and a number is not finite; names the tensor.
    """
    if storage == "bf16" or storage == "fp32":
        kept = torch.bfloat16 if storage == "bf16" else torch.float32
        return {name: tensor.to(kept) for name, tensor in adapter.items()}
    coded: dict[str, Tensor] = {}
    for name, tensor in adapter.items():
        try:
            q, scale = quantize(tensor.reshape(_blocks(name, tensor, storage)), MAX_LEVEL[storage])
        except ValueError as error:
            raise ValueError(f"{name}: {error}") from error
        q = q.view(tensor.shape)
        coded[name], coded[name + SCALE] = _paired(q) if storage == "int4" and _is_even(q) else q, scale
    return coded


def decode(stored: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return an adapter ready for computation: quantized tensors dequantized to fp32, all others unchanged."""
    tensors: dict[str, Tensor] = {}
    for name, tensor in stored.items():
        if not name.endswith(SCALE):
            scale = stored.get(name + SCALE)
            if scale is not None:
                tensor = dequantize(_unpaired(tensor) if tensor.dtype == torch.uint8 else tensor, scale)
            tensors[name] = tensor
    return tensors


def _blocks(name: str, tensor: Tensor, storage: Storage) -> tuple[int, ...]:
    """Return the shape of a tensor (..., M, N) with one block in each last axis."""
    if tensor.dim() < 2 or (storage == "int8" and not name.endswith(".C")):
        return tuple(tensor.shape)
    *layers, rows, columns = tensor.shape
    numbers = rows * columns
    return (*layers, -1, BLOCK) if storage == "int4" and numbers % BLOCK == 0 else (*layers, numbers)


def _is_even(q: Int8[Tensor, "*rows N"]) -> bool:
    """Return whether rows are of even length; others keep a byte for each number."""
    return q.shape[-1] % 2 == 0


def _paired(q: Int8[Tensor, "*rows N"]) -> UInt8[Tensor, "*rows half"]:
    """Return neighbours of 4 bits, offset by 8, in one byte: the first in the low bits."""
    nibbles = (q + 8).to(torch.uint8)
    return nibbles[..., 0::2] | (nibbles[..., 1::2] << 4)


def _unpaired(packed: UInt8[Tensor, "*rows half"]) -> Int8[Tensor, "*rows N"]:
    return torch.stack([packed & 15, packed >> 4], dim=-1).flatten(-2).to(torch.int8) - 8
