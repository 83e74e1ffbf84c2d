"""Memory layout of one user's adapter: where every module's tensors lie inside a row, and their stored names.

Two forms: `lora` has an A and a B per module, `core` a matrix C between bases A and B that all users share.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

_LAYER_NUMBER = re.compile(r"\.(\d+)\.")

Bases = Mapping[str, tuple[Float[Tensor, "R I"], Float[Tensor, "O R"]]]
"""Per module, the A and B that all users share in the form `core`."""


@dataclass(frozen=True)
class Piece:
    """Position of one tensor of one module inside a slot's row.

    Attributes:
        projection: name of the stack that the tensor is stored in, the same for all layers.
        part: A, B, or the core C.
        shape: (R, I) for A, (O, R) for B, (R, R) for C.
        offset: index of its first value in the row.
    """

    module: str
    projection: str
    part: Literal["A", "B", "C"]
    shape: tuple[int, int]
    offset: int

    @property
    def down(self) -> bool:
        """Whether the tensor is A."""
        return self.part == "A"

    @property
    def size(self) -> int:
        """Number of values."""
        return self.shape[0] * self.shape[1]


@dataclass(frozen=True)
class Layout:
    """Memory layout of a slot: where every module's A and B, or its core, lie inside a row of `width` values.

    Attributes:
        bases: the bases of the form `core`, empty while they are not trained; None for the form `lora`.
    """

    rank: int
    pieces: tuple[Piece, ...]
    width: int
    bases: Bases | None = field(default=None, compare=False, repr=False)

    @classmethod
    def of(cls, shapes: Mapping[str, tuple[int, int]], rank: int, bases: Bases | None = None) -> Layout:
        """Lay out LoRAs of `rank`, or with `bases` cores, for modules given as name -> (inputs, outputs)."""
        kinds: dict[str, list[str]] = {}
        for name, (inputs, outputs) in shapes.items():
            pattern = _LAYER_NUMBER.sub(".*.", name, count=1)
            same = [k for k in kinds if k.split("@")[0] == pattern and shapes[kinds[k][0]] == (inputs, outputs)]
            key = same[0] if same else pattern if pattern not in kinds else f"{pattern}@{inputs}x{outputs}"
            kinds.setdefault(key, []).append(name)
        pieces, offset = list[Piece](), 0
        parts: tuple[Literal["A", "B", "C"], ...] = ("A", "B") if bases is None else ("C",)
        for projection, names in kinds.items():
            for part in parts:
                for name in names:
                    inputs, outputs = shapes[name]
                    shape = {"A": (rank, inputs), "B": (outputs, rank), "C": (rank, rank)}[part]
                    pieces.append(Piece(name, projection, part, shape, offset))
                    offset += pieces[-1].size
        return cls(rank, tuple(pieces), offset, bases)

    def stacks(self) -> dict[str, tuple[int, tuple[int, int, int]]]:
        """Return offset in the row and shape (layers, ...) of each stored tensor "PROJECTION.A", ".B" or ".C"."""
        groups: dict[str, list[Piece]] = {}
        for piece in self.pieces:
            groups.setdefault(f"{piece.projection}.{piece.part}", []).append(piece)
        return {key: (group[0].offset, (len(group), *group[0].shape)) for key, group in groups.items()}

    def unpack(self, row: Float[Tensor, "P"]) -> dict[str, Tensor]:
        """Return views of a slot's row as the stacked tensors of the stored format."""
        return {key: row[at : at + _count(shape)].view(shape) for key, (at, shape) in self.stacks().items()}

    def factors(self, row: Float[Tensor, "P"]) -> dict[str, Tensor]:
        """Return the stacked A and B of a slot's row, differentiably; a core gives the shared A, and B C_u for B."""
        if self.bases is None:
            return self.unpack(row)
        modules: dict[str, list[str]] = {}
        for piece in self.pieces:
            modules.setdefault(piece.projection, []).append(piece.module)
        found: dict[str, Tensor] = {}
        for projection, names in modules.items():
            at, shape = self.stacks()[f"{projection}.C"]
            down, up = (torch.stack([self.bases[name][part] for name in names]).to(row) for part in (0, 1))
            found |= {f"{projection}.A": down, f"{projection}.B": up @ row[at : at + _count(shape)].view(shape)}
        return found

    def pack(self, tensors: Mapping[str, Tensor], row: Float[Tensor, "P"]) -> None:
        """Copy stored tensors into a slot's row.

        Raises:
            ValueError: a tensor is missing, unknown or of another shape.
        """
        stacks = self.stacks()
        if tensors.keys() != stacks.keys():
            odd = sorted(tensors.keys() ^ stacks.keys())
            raise ValueError(f"the adapter does not fit the model's modules: {', '.join(odd[:3])}")
        for key, (at, shape) in stacks.items():
            if tuple(tensors[key].shape) != shape:
                raise ValueError(f"{key} has shape {tuple(tensors[key].shape)}, the model's is {shape}")
            row[at : at + _count(shape)].copy_(tensors[key].reshape(-1))


def _count(shape: Sequence[int]) -> int:
    return shape[0] * shape[1] * shape[2]
