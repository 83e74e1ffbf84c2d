"""One user's piece of work for the engine, how far it is, and what became of it.

Knows nothing about models or slots.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from jaxtyping import Float
from torch import Tensor

from proper.data.batching import EncodedExample


@dataclass(frozen=True)
class Job:
    """What is to be fitted for one user.

    Attributes:
        items: what the adapter is trained on.
        held: the user's own held-out items; empty: train all `epochs` and keep the last step.
        epochs: passes over the items at most.
        horizon: passes after which the schedule would reach zero; None: `epochs`.
    """

    user: str
    embedding: Float[Tensor, "D"]
    items: tuple[EncodedExample, ...]
    held: tuple[EncodedExample, ...] = ()
    epochs: int = 1
    horizon: int | None = None


@dataclass
class FitProgress:
    """How far a job is.

    Attributes:
        index: which of the jobs it is.
        step: optimizer steps done.
        losses: held-out loss per token before training and after each pass.
        best: the pass with the lowest held-out loss (0: before training).
        trained: training loss of the last pass, per token.
    """

    index: int
    step: int = 0
    losses: list[float] = field(default_factory=list)
    best: int = 0
    trained: float = 0.0


@dataclass(frozen=True)
class FitResult:
    """What became of a job.

    Attributes:
        items: how many the adapter was trained on.
        row: the adapter (P,), on the CPU; None for a user in quarantine.
        reason: why a user is in quarantine.
    """

    user: str
    embedding: Float[Tensor, "D"]
    items: int
    state: FitProgress
    row: Float[Tensor, "P"] | None
    reason: str | None = None


class Jobs(Protocol):
    """Jobs that are made when they are asked for, so that memory does not grow with the users."""

    def __len__(self) -> int: ...  # noqa: D105
    def __getitem__(self, index: int, /) -> Job: ...  # noqa: D105


Done = Callable[[Sequence[FitResult], bool], None]
"""Takes outcomes, and whether a kill may have come after they were handed over before."""


def refusal(job: Job, longest: int | None) -> str | None:
    """Return why a job cannot be run at all, or None.

    Args:
        job: the job.
        longest: positions that the backbone has; None where it has no limit.
    """
    if not job.items:
        return "quarantined: no history"
    rows = (*job.items, *job.held)
    if any(row.start < 1 or row.start >= len(row.ids) for row in rows):
        return "quarantined: an item without a prompt or an answer"
    if longest is not None and any(len(row.ids) > longest for row in rows):
        return "quarantined: a text is longer than the backbone's positions"
    return None
