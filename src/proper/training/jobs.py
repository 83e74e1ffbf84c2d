"""Data types of stage 3a: users' fitting jobs for `MultiUserTrainer`, their progress and their results."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from jaxtyping import Float
from torch import Tensor

from proper.config import UsersConfig
from proper.data.derived.views import Histories
from proper.data.encoder import EncodedExample, Encoder


@dataclass(frozen=True)
class Job:
    """One user's adapter to fit.

    Attributes:
        items: the training items.
        held_out: the user's held-out items; if empty, train all `epochs` and keep the last step.
        epochs: maximum number of passes over the items.
        horizon: number of passes after which the schedule would reach zero; None: `epochs`.
    """

    user: str
    embedding: Float[Tensor, "D"]
    items: tuple[EncodedExample, ...]
    held_out: tuple[EncodedExample, ...] = ()
    epochs: int = 1
    horizon: int | None = None


@dataclass
class FitProgress:
    """The progress of a job.

    Attributes:
        index: index of the job in `Jobs`.
        step: optimizer steps done.
        losses: held-out loss per token before training and after each pass.
        best: the pass with the lowest held-out loss (0: before training).
        trained: training loss of the last step's batch, per token.
    """

    index: int
    step: int = 0
    losses: list[float] = field(default_factory=list)
    best: int = 0
    trained: float = 0.0


@dataclass(frozen=True)
class FitResult:
    """The result of a job.

    Attributes:
        items: number of training items.
        row: the adapter (P,), on the CPU; None for a user in quarantine.
        reason: why the user is in quarantine; None otherwise.
    """

    user: str
    embedding: Float[Tensor, "D"]
    items: int
    state: FitProgress
    row: Float[Tensor, "P"] | None
    reason: str | None = None


class Jobs(Protocol):
    """A sequence of jobs that are created on access, so that memory does not grow with the number of users."""

    def __len__(self) -> int: ...  # noqa: D105
    def __getitem__(self, index: int, /) -> Job: ...  # noqa: D105


@dataclass(frozen=True)
class HistoryJobs:
    """The jobs of some users, created from their histories on access.

    Attributes:
        embeddings: e_u of `users` (U, D).
        passes: each user's number of passes over all items; if None, the newest items are held out instead.
    """

    config: UsersConfig
    dataset: Histories
    encoder: Encoder
    users: Sequence[str]
    embeddings: Float[Tensor, "U D"]
    passes: Mapping[str, int] | None

    def __len__(self) -> int:
        return len(self.users)

    def __getitem__(self, at: int, /) -> Job:
        user, epochs = self.users[at], int(self.config.epochs)
        items = [self.encoder.encode(example) for example in self.dataset.history(user, self.config.max_items)]
        if self.passes is not None:
            return Job(user, self.embeddings[at], tuple(items), epochs=self.passes[user], horizon=epochs)
        cut = len(items) - held_out_items(len(items), self.config.tiers.validation)
        return Job(user, self.embeddings[at], tuple(items[:cut]), tuple(items[cut:]), epochs=epochs)

    def rows(self) -> int:
        """Return the number of training items of all jobs, without encoding any."""
        total = 0
        for user in self.users:
            items = len(self.dataset.history(user, self.config.max_items))
            total += items if self.passes is not None else items - held_out_items(items, self.config.tiers.validation)
        return total


def held_out_items(items: int, share: float) -> int:
    """Return how many of a user's newest items are held out: at least one, and never all."""
    return min(items - 1, max(1, round(items * share)))


Done = Callable[[Sequence[FitResult], bool], None]
"""Callback for results; the flag tells whether they may have been passed on before, by a run killed after that."""


def refusal(job: Job, longest: int | None) -> str | None:
    """Return why a job cannot be run at all, or None if it can.

    Args:
        job: the job.
        longest: maximum number of positions of the backbone; None if it has no limit.
    """
    if not job.items:
        return "quarantined: no history"
    rows = (*job.items, *job.held_out)
    if any(row.start < 1 or row.start >= len(row.ids) for row in rows):
        return "quarantined: an item without a prompt or an answer"
    if longest is not None and any(len(row.ids) > longest for row in rows):
        return "quarantined: a text is longer than the backbone's positions"
    return None
