"""Data types of stage 3a: users' fitting jobs for `MultiUserTrainer`, their progress and their results.

A job's number of passes follows from `users.steps` or `users.epochs`. A trial measures the held-out loss `PARTS` times,
after equal parts of these passes, so that users with different numbers of items can be compared.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Protocol

import torch
from jaxtyping import Float
from torch import Tensor

from proper.config import UsersConfig
from proper.data.batching import RowEncoder
from proper.data.encoder import EncodedExample
from proper.data.histories import Histories
from proper.training.checkpoint import seed_of

PARTS = 4
"""Number of measurements of the held-out loss in a trial, after equal parts of the user's passes."""


@dataclass(frozen=True)
class Job:
    """One user's adapter to fit.

    Attributes:
        items: the training items.
        held_out: the user's held-out items; if empty, train all `epochs` and keep the last step.
        anchor: the adapter that training is measured against and `users.distance` pulls toward (P,); None for the
            group model, whose B A is 0.
        epochs: maximum number of passes over the items.
        horizon: number of passes after which the schedule would reach zero; None: `epochs`.
        measured: passes after which the held-out loss is measured; empty means after every pass.
        scales: factors on the adapter at which it is measured; the last is 1.
        start: the adapter (P,) that training goes on from; None: a fresh one.
    """

    user: str
    embedding: Float[Tensor, "D"]
    items: tuple[EncodedExample, ...]
    held_out: tuple[EncodedExample, ...] = ()
    anchor: Float[Tensor, "P"] | None = None
    epochs: int = 1
    horizon: int | None = None
    measured: tuple[int, ...] = ()
    scales: tuple[float, ...] = (1.0,)
    start: Float[Tensor, "P"] | None = None

    def steps_per_pass(self, batch_size: int) -> int:
        """Return the number of optimizer steps of one pass over the items."""
        return -(-len(self.items) // batch_size)

    def batch(self, seed: int, step: int, batch_size: int) -> list[EncodedExample]:
        """Return the rows of a step, which depend on the seed, the user and the step only."""
        epoch, at = divmod(step, self.steps_per_pass(batch_size))
        generator = torch.Generator().manual_seed(seed_of(seed, "order", self.user, epoch))
        order = torch.randperm(len(self.items), generator=generator).tolist()
        return [self.items[i] for i in order[at * batch_size : (at + 1) * batch_size]]

    @property
    def reference(self) -> float:
        """The scale of the adapter at which the loss before training is measured; 0 gives that of the group model."""
        return 0.0 if self.start is not None and self.anchor is None else 1.0

    @property
    def measured_passes(self) -> Sequence[int]:
        """The passes after which the held-out loss is measured."""
        return self.measured or range(1, self.epochs + 1)


@dataclass
class FitProgress:
    """The progress of a job.

    Attributes:
        index: index of the job in `Jobs`.
        step: optimizer steps done.
        losses: held-out loss per token before training and at each measurement.
        best: the number of passes with the lowest held-out loss (0: before training).
        trained: training loss of the last step's batch, per token.
        before: each held-out item's summed loss and its number of tokens, before training.
        grid: held-out loss per token at each measurement and scale.
        spreads: for each number in `grid`, the sum over items of the squared deviation from the mean gain, in units of
            the loss per token of an item of mean length.
    """

    index: int
    step: int = 0
    losses: list[float] = field(default_factory=list)
    best: int = 0
    trained: float = 0.0
    before: list[list[float]] = field(default_factory=list)
    grid: list[list[float]] = field(default_factory=list)
    spreads: list[list[float]] = field(default_factory=list)

    @property
    def stalled(self) -> int:
        """Number of measurements since the lowest held-out loss at any scale."""
        lows = [self.losses[0], *map(min, self.grid)] if self.losses else [0.0]
        return len(lows) - 1 - max(at for at, low in enumerate(lows) if low == min(lows))


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


Starts = Callable[[str, Float[Tensor, "D"]], Float[Tensor, "P"] | None]
"""Function from a user and their embedding to the adapter that training starts from; None for a fresh one."""


def fresh(user: str, embedding: Float[Tensor, "D"]) -> None:
    """Start every user from a fresh adapter, which changes nothing: B = 0, or C = 0."""


class Jobs(Protocol):
    """A sequence of jobs that are created on access, so that memory does not grow with the number of users."""

    def __len__(self) -> int: ...
    def __getitem__(self, index: int, /) -> Job: ...


@dataclass(frozen=True)
class HistoryJobs:
    """The jobs of some users, created from their histories on access.

    Attributes:
        embeddings: e_u of `users` (U, D).
        trial: whether the newest items are held out and measured; else the jobs are on all items.
        part: the number of parts, of `PARTS`, of the full passes that are trained.
        held_out: whether the trial's held-out items are the training items, as for a router.
        measured: whether the trial's held-out items are measured; else they are only left out.
        starts: where each user's adapter starts.
    """

    config: UsersConfig
    dataset: Histories
    encoder: RowEncoder
    users: Sequence[str]
    embeddings: Float[Tensor, "U D"]
    trial: bool
    part: int = PARTS
    held_out: bool = False
    measured: bool = True
    starts: Starts = fresh

    def __len__(self) -> int:
        return len(self.users)

    def __getitem__(self, at: int, /) -> Job:
        user, embedding = self.users[at], self.embeddings[at]
        items = [self.encoder.encode(example) for example in self.dataset.history(user, self.config.max_items)]
        cut = len(items) - held_out_items(len(items), self.config.tiers.validation) if self.trial else len(items)
        if self.held_out:
            return Job(user, embedding, tuple(items[cut:]))
        full = full_passes(self.config, cut)
        epochs = passes_of(full, self.part)
        held_out = tuple(items[cut:]) if self.measured else ()
        start = self.starts(user, embedding)
        job = Job(user, embedding, tuple(items[:cut]), held_out, epochs=epochs, horizon=full, start=start)
        if not held_out:
            return job
        measured = sorted({passes_of(full, part) for part in range(1, self.part + 1)})
        return replace(job, measured=tuple(measured), scales=(*self.config.scales, 1.0))

    def rows(self) -> int:
        """Return the number of training items of all jobs, without encoding any."""
        total = 0
        for user in self.users:
            items = len(self.dataset.history(user, self.config.max_items))
            held_out = held_out_items(items, self.config.tiers.validation) if self.trial else 0
            total += held_out if self.held_out else items - held_out
        return total


def full_passes(config: UsersConfig, items: int) -> int:
    """Return a user's full number of passes over `items` items: `epochs`, or at least `steps` optimizer steps."""
    if config.steps is None:
        return max(1, int(config.epochs))
    return max(1, math.ceil(config.steps / max(1, math.ceil(items / config.batch_size))))


def passes_of(full: int, part: int) -> int:
    """Return the number of passes of `part` of `PARTS` parts, at least one."""
    return max(1, round(full * part / PARTS))


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
    if any(row.start < 1 or row.answers < 1 for row in rows):
        return "quarantined: an item without a prompt or an answer"
    if longest is not None and any(len(row.ids) > longest for row in rows):
        return "quarantined: a text is longer than the backbone's positions"
    return None
