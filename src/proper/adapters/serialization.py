"""Serialization of adapters: named tensors to contiguous bytes and back, and the check that their values are sound.

The tensors follow each other without gaps, wider dtypes first, otherwise in the given order: an adapter of one dtype
that comes from a bank's row keeps the row's order. A `TensorSpec` describes the bytes; it is stored once for all users
who share it.

Sound values are finite, and of a magnitude that training produces: one NaN makes the whole output NaN, and far larger
numbers overflow to NaN a few layers later. Records are checked when they are imported, stored and loaded.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from math import prod

import torch
from torch import Tensor

from proper.errors import StoreError

MAX_ABSOLUTE = 1e4
"""Trained adapters and embeddings stay below 1e2."""

SCALE = ":scale"
"""Suffix of the name of a quantized tensor's scales (`quantization`)."""

MAX_LEVEL = {"int8": 127, "int4": 7}
"""Largest quantized number by storage: a tensor's numbers reach this times the scale."""

# The names that the safetensors format uses.
_NAMES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.bfloat16: "BF16",
    torch.float16: "F16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int8: "I8",
    torch.uint8: "U8",
}
_DTYPES = {name: dtype for dtype, name in _NAMES.items()}
_ALIGNMENT = 64  # bytes; the tensors of a file begin at a multiple


@dataclass(frozen=True)
class TensorEntry:
    """One tensor: its name, dtype, shape and byte offset."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    offset: int

    @property
    def size(self) -> int:
        """Size of the tensor in bytes."""
        return prod(self.shape) * self.dtype.itemsize


@dataclass(frozen=True)
class TensorSpec:
    """Names, dtypes, shapes and offsets of the tensors in an adapter's bytes."""

    entries: tuple[TensorEntry, ...]

    @property
    def size(self) -> int:
        """Size of the whole adapter in bytes."""
        return self.entries[-1].offset + self.entries[-1].size if self.entries else 0

    def text(self) -> str:
        """Return the spec as one line of JSON: name, dtype and shape of each tensor."""
        return json.dumps([[e.name, _NAMES[e.dtype], e.shape] for e in self.entries], separators=(",", ":"))

    @classmethod
    def parse(cls, text: str) -> TensorSpec:
        """Parse a spec from the output of `text`.

        Raises:
            ValueError: the text is not a spec.
        """
        entries, offset = [], 0
        try:
            for name, dtype, shape in json.loads(text):
                entries.append(TensorEntry(name, _DTYPES[dtype], tuple(shape), offset))
                offset += entries[-1].size
        except (KeyError, TypeError) as error:
            raise ValueError(f"not a layout: {error}") from error
        return cls(tuple(entries))

    def header(self) -> bytes:
        """Return the safetensors header: header and adapter bytes together are a safetensors file."""
        named = {
            e.name: {"dtype": _NAMES[e.dtype], "shape": e.shape, "data_offsets": [e.offset, e.offset + e.size]}
            for e in self.entries
        }
        text = json.dumps(named, separators=(",", ":")).encode()
        text += b" " * (-(len(text) + 8) % _ALIGNMENT)
        return len(text).to_bytes(8, "little") + text


def pack(adapter: Mapping[str, Tensor]) -> tuple[TensorSpec, bytes]:
    """Return an adapter's spec and bytes.

    Raises:
        StoreError: the store does not support a tensor's dtype.
    """
    entries, pieces, offset = [], [], 0
    for name, tensor in sorted(adapter.items(), key=lambda pair: -pair[1].dtype.itemsize):
        if tensor.dtype not in _NAMES:
            raise StoreError(f"{name}: an adapter of {tensor.dtype} cannot be stored")
        flat = tensor.detach().cpu().contiguous().reshape(-1)
        entries.append(TensorEntry(name, tensor.dtype, tuple(tensor.shape), offset))
        pieces.append(flat.view(torch.uint8).numpy().data if flat.numel() else b"")
        offset += entries[-1].size
    return TensorSpec(tuple(entries)), b"".join(pieces)


def unpack(spec: TensorSpec, data: Tensor) -> dict[str, Tensor]:
    """Return an adapter's tensors as views of its bytes (uint8)."""
    return {e.name: data[e.offset : e.offset + e.size].view(e.dtype).view(e.shape) for e in spec.entries}


def is_sound(tensor: Tensor, largest: float = MAX_ABSOLUTE) -> bool:
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
        if not is_sound(tensor, MAX_ABSOLUTE / MAX_LEVEL["int8"] if name.endswith(SCALE) else MAX_ABSOLUTE):
            finite = bool(tensor.isfinite().all())
            return f"{name}: {f'numbers beyond {MAX_ABSOLUTE:g}' if finite else 'numbers that are not finite'}"
    return None


def require_sound(user: str, tensors: Mapping[str, Tensor]) -> None:
    """Require that all tensors of a user are sound.

    Raises:
        StoreError: a tensor is not; names user and tensor.
    """
    fault = fault_of(tensors)
    if fault is not None:
        raise StoreError(f"user {user!r}: {fault}")
