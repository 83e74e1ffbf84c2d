"""Per-row batch context for the adapted layers: mode, user embedding and adapter slot of each row; gate recording.

A model has one `BatchContext`, shared by all its adapted layers and set just before a forward pass. It holds slots and
embeddings, not user ids.
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
class GatheredWeights:
    """Weights of a batch's rows by module, gathered from the bank.

    Attributes:
        adapters: A_u (B, R, I) and the transposed B_u (B, R, O).
        matrices: with a router of 3b, M_u (B, E, R).
    """

    adapters: dict[str, tuple[Tensor, Tensor]] = field(default_factory=dict)
    matrices: dict[str, Tensor] = field(default_factory=dict)


@dataclass(frozen=True)
class RowContext:
    """Context of the B rows of one batch, as the adapted layers need it.

    Attributes:
        mode: which stages' layers are applied.
        embedding: e_u of each row's user (B, D); None where no mixture is used.
        slots: each row's slot in the adapter bank (B,); -1 for a row without an adapter. None: no row has one.
        complete: whether every row has a slot, so that the layers need no masks.
        experts: mask of the rows that experts are applied to (B,); the others use the backbone alone. None: all rows.
        trace: whether the gates of every row's last token are recorded, for `BatchContext.last`.
        users: index of each row's user among the batch's distinct users, from 0 (B,); only for recording.
        tasks: index of each row's task, from 0 (B,); only routers of several tasks read it.
        mask: the tokens (B, T) over which gates are averaged; None switches recording off.
        generators: one per row, for the dropout of user adapters; None switches that dropout off.
        gathered: weights that layers cache between forward passes over these same rows; None caches nothing. Allowed
            only where nothing is trained and no slot in use changes meanwhile.
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
    gathered: GatheredWeights | None = None
    tasks: Int[Tensor, "B"] | None = None

    @property
    def size(self) -> int:
        """Number of rows; 0 where nothing depends on rows."""
        for tensor in (self.embedding, self.slots):
            if tensor is not None:
                return int(tensor.shape[0])
        return 0


@dataclass
class BatchContext:
    """Holder of the current batch's row context, and of the gates that the layers record for it.

    Attributes:
        rows: the current row context, set by `use` and read by every adapted layer.
        gates: mean gates (U, E) per module of the batch's users, recorded where `rows.mask` is set.
        traced: gates (B, E) per module of each row's last token, recorded where `rows.trace` is set.
    """

    rows: RowContext = field(default_factory=RowContext)
    gates: dict[str, Float[Tensor, "U E"]] = field(default_factory=dict)
    traced: dict[str, Float[Tensor, "B E"]] = field(default_factory=dict)

    @contextmanager
    def use(self, rows: RowContext) -> Iterator[BatchContext]:
        """Set the row context inside the block and clear the recorded gates; then restore the previous context."""
        before, self.rows, self.gates, self.traced = self.rows, rows, {}, {}
        try:
            yield self
        finally:
            self.rows = before

    def contexts(self) -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
        """Return the `context_fn` result for torch's checkpointing: contexts of a layer's forward pass and its rerun.

        The rerun happens in the backward pass, when the row context of this batch is no longer set.
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
        """Record the gates of module `name`: each user's mean over the tokens in the mask, and the last token's trace.

        Only the first call for a module is stored. A second call, when gradient checkpointing reruns a layer in the
        backward pass, still does the same computation: torch pairs both runs' saved tensors by number.
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
        """Return the recorded mean gates of all modules, in the order in which they ran."""
        return torch.stack(list(self.gates.values()))

    def last(self) -> Float[Tensor, "B E"] | None:
        """Return the traced gates of each row's last token, mean over modules; None where no mixture was used."""
        return torch.stack(list(self.traced.values())).mean(0) if self.traced else None
