"""Fits the embeddings of users unknown to stage 2 on their own items, with all else frozen (method: tiers).

An embedding starts where the encoder places it, or at the mean embedding, and is trained as in stage 2, with one item
per step, which is about one user's share of a batch of many users. The learning rate is that stage's or, if it is
higher, `MIN_RELATIVE_RATE` of the spread of the embeddings at their start: the few steps must be able to lead away
from the start.
Early stopping on the user's held-out items gives the number of passes, which may be 0; then the embedding is fitted
again on all items for that many passes.

Many users are fitted in one batch: a step takes one item of each. Every user has moments, order of items and schedule
of their own, so the result is that of fitting the user alone, up to rounding.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from jaxtyping import Float
from torch import Tensor

from proper.config import GroupsConfig
from proper.data.batching import by_length, collate
from proper.data.encoder import EncodedExample
from proper.errors import NonFiniteLossError
from proper.layers.batch_context import RowContext
from proper.models.personal import ProperModel
from proper.training.checkpoint import seed_of
from proper.training.optim import RowAdamW, rate_factor

MIN_RELATIVE_RATE = 0.05
"""Least learning rate, as a part of `groups.embedding_init`: Adam moves each number by about the rate in a step."""

HELD_OUT_BATCH = 16
"""Batch size for the held-out loss of one user."""

ROWS_PER_BATCH = 64
"""Rows of many users in one forward pass."""


@dataclass(frozen=True)
class Setting:
    """Model and hyperparameters for fitting embeddings; `step` is called after every step of every user."""

    model: ProperModel
    config: GroupsConfig
    seed: int
    step: Callable[[], None]

    @property
    def passes(self) -> int:
        """Maximum number of passes over the items."""
        return math.ceil(self.config.epochs)

    @property
    def rate(self) -> float:
        """Learning rate of the embedding."""
        return max(self.config.embedding_learning_rate, MIN_RELATIVE_RATE * self.config.embedding_init)


@dataclass(frozen=True)
class EmbeddingJob:
    """One user's embedding to fit.

    Attributes:
        user: the user's id; seeds the order of items.
        items: the items, oldest first.
        held_out: how many of the newest items are held out for early stopping; with 0, all passes are made.
        start: the initial embedding.
        trial_start: the initial embedding of the trial, which must not know the held-out items; None: `start`.
    """

    user: str
    items: Sequence[EncodedExample]
    held_out: int
    start: Float[Tensor, "D"]
    trial_start: Float[Tensor, "D"] | None = None


@dataclass(frozen=True)
class FittedEmbedding:
    """A fitted embedding, and the held-out loss per token before the first pass and after each pass."""

    embedding: Float[Tensor, "D"]
    losses: tuple[float, ...]
    passes: int


def fit_embedding(setting: Setting, job: EmbeddingJob) -> FittedEmbedding:
    """Fit one user's embedding.

    Raises:
        NonFiniteLossError: a step's loss is not finite.
    """
    (found,) = fit_embeddings(setting, [job])
    if isinstance(found, NonFiniteLossError):
        raise found
    return found


def try_embedding(setting: Setting, job: EmbeddingJob) -> FittedEmbedding:
    """Fit one user's embedding on all but the held-out items, up to the pass with the lowest loss on these.

    Raises:
        NonFiniteLossError: a step's loss is not finite.
    """
    (found,) = _try(setting, [job])
    if isinstance(found, NonFiniteLossError):
        raise found
    return found


def fit_embeddings(setting: Setting, jobs: Sequence[EmbeddingJob]) -> list[FittedEmbedding | NonFiniteLossError]:
    """Fit many users' embeddings in one batch; a user whose loss is not finite gets the error; the others go on."""
    trials = [job for job in jobs if job.held_out]
    tried = {job.user: each for job, each in zip(trials, _try(setting, trials), strict=True)}
    finals = list[_Descent]()
    for job in jobs:
        trial = tried.get(job.user)
        if not isinstance(trial, NonFiniteLossError):
            passes = setting.passes if trial is None else trial.passes
            finals.append(_Descent(job.user, job.items, job.start, passes))
    _descend(setting, finals)
    ends, found = {each.user: each for each in finals}, list[FittedEmbedding | NonFiniteLossError]()
    for job in jobs:
        trial = tried.get(job.user)
        if isinstance(trial, NonFiniteLossError):
            found.append(trial)
            continue
        end = ends[job.user]
        found.append(end.error or FittedEmbedding(end.end, () if trial is None else trial.losses, end.passes))
    return found


def _try(setting: Setting, trials: Sequence[EmbeddingJob]) -> list[FittedEmbedding | NonFiniteLossError]:
    """Make the trials of many users in one batch."""
    descents = [
        _Descent(
            job.user,
            job.items[: -job.held_out],
            job.start if job.trial_start is None else job.trial_start,
            setting.passes,
        )
        for job in trials
    ]
    _descend(setting, descents)
    losses = _held_out_losses(setting, trials, [[each.start, *each.after] for each in descents])
    return [
        each.error or FittedEmbedding([each.start, *each.after][best := own.index(min(own))], tuple(own), best)
        for each, own in zip(descents, losses, strict=True)
    ]


@dataclass
class _Descent:
    """Gradient descent of one user's embedding; `after` has the embedding after each pass."""

    user: str
    items: Sequence[EncodedExample]
    start: Float[Tensor, "D"]
    passes: int
    after: list[Float[Tensor, "D"]] = field(default_factory=list)
    error: NonFiniteLossError | None = None
    order: list[int] = field(default_factory=list)

    @property
    def end(self) -> Float[Tensor, "D"]:
        """The embedding after the last pass; the start without one."""
        return self.after[-1] if self.after else self.start

    def item(self, step: int, seed: int) -> EncodedExample | None:
        """Return the item of a step; None when all passes are made, or the loss was not finite."""
        epoch, at = divmod(step, len(self.items))
        if epoch >= self.passes or self.error is not None:
            return None
        if at == 0:
            draw = torch.Generator().manual_seed(seed_of(seed, "embedding", self.user, epoch))
            self.order = torch.randperm(len(self.items), generator=draw).tolist()
        return self.items[self.order[at]]


def _descend(setting: Setting, descents: Sequence[_Descent]) -> None:
    """Make all passes of every descent; the learning rate decays as if `setting.passes` were made."""
    if not descents:
        return
    values = torch.stack([each.start.float() for each in descents])
    optimizer, step = RowAdamW.of(values), 0
    while True:
        work = [(row, item) for row, each in enumerate(descents) if (item := each.item(step, setting.seed)) is not None]
        if not work:
            return
        gradients = _gradients(setting, [item for _, item in work], values[[row for row, _ in work]])
        good = []
        for at, (row, _) in enumerate(work):
            if gradients[at].isfinite().all():
                good.append(at)
            else:
                descents[row].error = NonFiniteLossError("the embedding's loss is not finite")
        rows = [work[at][0] for at in good]
        rates = [setting.rate * _factor(setting, descents[row], step) for row in rows]
        chosen = torch.tensor(rows, dtype=torch.long)
        optimizer.step(values, chosen, gradients[good], rates)
        for row in rows:
            setting.step()
            if (step + 1) % len(descents[row].items) == 0:
                descents[row].after.append(values[row].clone())
        step += 1


def _factor(setting: Setting, descent: _Descent, step: int) -> float:
    total = setting.passes * len(descent.items)
    return rate_factor(step, total, setting.config.warmup, setting.config.schedule)


def _gradients(setting: Setting, items: Sequence[EncodedExample], values: Float[Tensor, "n D"]) -> Float[Tensor, "n D"]:
    """Return the gradient of each item's loss per token with respect to its embedding; NaN where it is not finite."""
    found = torch.empty_like(values)
    for piece in _pieces(setting, items, ROWS_PER_BATCH):
        own = values[piece].detach().to(setting.model.device).requires_grad_()
        total, tokens = _losses(setting, [items[at] for at in piece], own)
        losses = total / tokens
        (gradient,) = torch.autograd.grad(losses.sum(), own)
        gradient[~losses.isfinite()] = math.nan
        found[piece] = gradient.cpu()
    return found


@torch.no_grad()
def _held_out_losses(
    setting: Setting, jobs: Sequence[EmbeddingJob], tried: Sequence[Sequence[Float[Tensor, "D"]]]
) -> list[list[float]]:
    """Return every job's mean loss per answer token on its held-out items at each tried embedding; infinity if NaN."""
    size = HELD_OUT_BATCH if len(jobs) == 1 else ROWS_PER_BATCH
    work = [
        (job, attempt, item)
        for job, each in enumerate(tried)
        for attempt in range(len(each))
        for item in jobs[job].items[len(jobs[job].items) - jobs[job].held_out :]
    ]
    sums = [[[0.0, 0.0] for _ in each] for each in tried]
    for piece in _pieces(setting, [item for _, _, item in work], size):
        rows = [work[at] for at in piece]
        own = torch.stack([tried[job][attempt] for job, attempt, _ in rows]).to(setting.model.device)
        totals, tokens = _losses(setting, [item for _, _, item in rows], own)
        for (job, attempt, _), total, count in zip(rows, totals.tolist(), tokens.tolist(), strict=True):
            sums[job][attempt][0] += total
            sums[job][attempt][1] += count
    return [[total / count if math.isfinite(total) else math.inf for total, count in each] for each in sums]


def _pieces(setting: Setting, items: Sequence[EncodedExample], size: int) -> list[list[int]]:
    return by_length([len(item.ids) for item in items], size, setting.model.backbone.batch_tokens)


def _losses(
    setting: Setting, items: Sequence[EncodedExample], embeddings: Float[Tensor, "B D"]
) -> tuple[Float[Tensor, "B"], Float[Tensor, "B"]]:
    batch = collate(items, setting.model.backbone.pad_id, setting.model.device)
    return setting.model.answer_losses(batch, RowContext("groups", embedding=embeddings))
