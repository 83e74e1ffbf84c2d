"""Who owns each row of the batch in hand: the one object through which every adapted layer learns it.

A model has one `BatchContext`; all its adapted layers hold it. It is set just before a forward pass.
Knows nothing about user ids, models or tokens: rows are numbers, embeddings are vectors.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Literal

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

Mode = Literal["off", "groups", "fit", "users"]
"""off: the backbone alone; groups: experts (stage 2); fit: + user LoRA (3a); users: + LoRA-aware router (3b)."""


@dataclass(frozen=True)
class Kept:
    """By module: each row's A_u (B, R, I), turned B_u (B, R, O) and, where there is a router of 3b, M_u (B, E, R)."""

    adapters: dict[str, tuple[Tensor, Tensor]] = field(default_factory=dict)
    matrices: dict[str, Tensor] = field(default_factory=dict)


@dataclass(frozen=True)
class RowContext:
    """What the layers need to know about the B rows of one batch.

    Attributes:
        mode: which of the stages' layers take part.
        embedding: e_u of each row's user (B, D); None where no mixture is used.
        slots: each row's slot in the adapter bank (B,); -1 for a row without an adapter. None: no row has one.
        complete: every row has a slot; this spares the layers masks.
        experts: the rows that experts take part in (B,); the others get the backbone alone. None: all of them.
        trace: whether the gates of every row's last token are kept, for `BatchContext.last`.
        users: which distinct user each row belongs to, counted from 0 within the batch (B,); only for recording.
        mask: the tokens (B, T) over which gates are averaged; None switches recording off.
        generators: one per row, from which dropout of user adapters is drawn; None switches that dropout off.
        kept: what layers keep between forward passes over these same rows. Only where nothing is trained and no slot in
            use changes meanwhile; None keeps nothing.
    """

    mode: Mode = "off"
    embedding: Float[Tensor, "B D"] | None = None
    slots: Int[Tensor, "B"] | None = None
    complete: bool = False
    experts: Bool[Tensor, "B"] | None = None
    trace: bool = False
    users: Int[Tensor, "B"] | None = None
    mask: Bool[Tensor, "B T"] | None = None
    generators: tuple[torch.Generator, ...] | None = None
    kept: Kept | None = None

    @property
    def size(self) -> int:
        """The number of rows; 0 where nothing depends on rows."""
        for tensor in (self.embedding, self.slots):
            if tensor is not None:
                return int(tensor.shape[0])
        return 0


@dataclass
class BatchContext:
    """The rows in hand, and what the layers saw of them.

    Attributes:
        rows: set by `use`, read by every adapted layer.
        gates: mean gates (U, E) per module of the batch's users, recorded where `rows.mask` is set.
        traced: gates (B, E) per module of each row's last token, recorded where `rows.trace` is set.
    """

    rows: RowContext = field(default_factory=RowContext)
    gates: dict[str, Float[Tensor, "U E"]] = field(default_factory=dict)
    traced: dict[str, Float[Tensor, "B E"]] = field(default_factory=dict)

    @contextmanager
    def use(self, rows: RowContext) -> Iterator[BatchContext]:
        """Let the layers work for `rows` inside the block; afterwards they are switched off again."""
        before, self.rows, self.gates, self.traced = self.rows, rows, {}, {}
        try:
            yield self
        finally:
            self.rows = before

    def contexts(self) -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
        """Return what torch's checkpointing wants: contexts for a layer's forward pass and for its second run.

        The second run is in the backward pass, when the rows in hand are no longer the batch's.
        """
        return nullcontext(), self._again(self.rows)

    @contextmanager
    def _again(self, rows: RowContext) -> Iterator[None]:
        before, self.rows = self.rows, rows
        try:
            yield
        finally:
            self.rows = before

    def record(self, name: str, gates: Float[Tensor, "B T E"]) -> None:
        """Keep what is wanted of the gates in module `name`: each user's mean over their tokens in the mask, traces.

        The first call for a module counts. The second, where gradient checkpointing runs a layer again in the backward
        pass, computes the same anyway: torch pairs both runs' saved tensors by number.
        """
        rows = self.rows
        if rows.trace:
            self.traced.setdefault(name, gates[:, -1])
        if rows.mask is None or rows.users is None:
            return
        mask = rows.mask.to(gates.dtype).unsqueeze(-1)
        users = int(rows.users.max()) + 1
        sums = gates.new_zeros(users, gates.shape[-1]).index_add(0, rows.users, (gates * mask).sum(1))
        counts = gates.new_zeros(users, 1).index_add(0, rows.users, mask.sum(1))
        self.gates.setdefault(name, sums / counts.clamp(min=1))

    def stacked(self) -> Float[Tensor, "M U E"]:
        """The recorded mean gates of all modules, in the order in which they ran."""
        return torch.stack(list(self.gates.values()))

    def last(self) -> Float[Tensor, "B E"] | None:
        """The traced gates of each row's last token, the mean over modules; None where no mixture was used."""
        return torch.stack(list(self.traced.values())).mean(0) if self.traced else None
