"""Fits the embedding of a user unknown to stage 2 on the user's own items, with all else frozen (method: tiers).

The embedding starts at the mean embedding and is trained as in stage 2, with one item per step, which is about one
user's share of a batch of many users. The learning rate is that stage's or, if it is higher, `REACH` of the spread of
the embeddings at their start: the few steps must be able to lead away from the mean. Early stopping on the user's
held-out items gives the number of passes; then the embedding is fitted again on all items for that many passes.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from proper.config import GroupsConfig
from proper.data.batching import collate
from proper.data.encoder import EncodedExample
from proper.errors import NonFiniteLossError
from proper.layers.batch_context import RowContext
from proper.models.personal import ProperModel
from proper.training.checkpoint import seed_of
from proper.training.optim import RowAdamW, factor

REACH = 0.05
"""Least learning rate, as a part of `groups.embedding_init`: Adam moves each number by about the rate in a step."""

MEASURED = 16
"""Batch size for the held-out loss."""


@dataclass(frozen=True)
class Setting:
    """Model and hyperparameters for fitting an embedding; `step` is called after every step."""

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
        return max(self.config.embedding_learning_rate, REACH * self.config.embedding_init)


@dataclass(frozen=True)
class FittedEmbedding:
    """An embedding, and the held-out loss per token before the first pass and after each."""

    embedding: Float[Tensor, "D"]
    losses: tuple[float, ...]
    passes: int


def fit_embedding(
    setting: Setting, user: str, items: Sequence[EncodedExample], held_out: int, start: Float[Tensor, "D"]
) -> FittedEmbedding:
    """Fit a user's embedding.

    Args:
        setting: model and hyperparameters.
        user: the user's id; seeds the order of items.
        items: the items, oldest first.
        held_out: how many of the newest items are held out for early stopping; with 0, all passes are made.
        start: the initial embedding.

    Raises:
        NonFiniteLossError: a step's loss is not finite.
    """
    if not held_out:
        return FittedEmbedding(_descend(setting, user, items, start, setting.passes)[-1], (), setting.passes)
    older, newest = items[:-held_out], items[-held_out:]
    tried = [start, *_descend(setting, user, older, start, setting.passes)]
    losses = [_held_out_loss(setting, newest, embedding) for embedding in tried]
    best = losses.index(min(losses))
    final = _descend(setting, user, items, start, best)[-1] if best else start
    return FittedEmbedding(final, tuple(losses), best)


def _descend(
    setting: Setting, user: str, items: Sequence[EncodedExample], start: Float[Tensor, "D"], passes: int
) -> list[Float[Tensor, "D"]]:
    """Return the embedding after each pass; the learning rate decays as if all passes were made."""
    values = start.float().clone().unsqueeze(0)
    optimizer, row = RowAdamW.of(values), torch.zeros(1, dtype=torch.long)
    after, total = [], setting.passes * len(items)
    for epoch in range(passes):
        draw = torch.Generator().manual_seed(seed_of(setting.seed, "embedding", user, epoch))
        for at, index in enumerate(torch.randperm(len(items), generator=draw).tolist()):
            gradient = _gradient(setting, items[index], values)
            rate = factor(epoch * len(items) + at, total, setting.config.warmup, setting.config.schedule)
            optimizer.step(values, row, gradient, setting.rate * rate)
            setting.step()
        after.append(values[0].clone())
    return after


def _gradient(setting: Setting, item: EncodedExample, values: Float[Tensor, "1 D"]) -> Float[Tensor, "1 D"]:
    own = values.detach().to(setting.model.device).requires_grad_()
    total, tokens = _losses(setting, [item], own)
    loss = total.sum() / tokens.sum()
    if not bool(torch.isfinite(loss)):
        raise NonFiniteLossError("the embedding's loss is not finite")
    (gradient,) = torch.autograd.grad(loss, own)
    return gradient.cpu()


@torch.no_grad()
def _held_out_loss(setting: Setting, items: Sequence[EncodedExample], embedding: Float[Tensor, "D"]) -> float:
    """Return the mean loss per answer token; infinity if it is not finite."""
    own, total, tokens = embedding.unsqueeze(0).to(setting.model.device), 0.0, 0.0
    for at in range(0, len(items), MEASURED):
        piece = items[at : at + MEASURED]
        sums, counts = _losses(setting, piece, own.expand(len(piece), -1))
        total, tokens = total + float(sums.sum()), tokens + float(counts.sum())
    return total / tokens if math.isfinite(total) else math.inf


def _losses(
    setting: Setting, items: Sequence[EncodedExample], embeddings: Float[Tensor, "B D"]
) -> tuple[Float[Tensor, "B"], Float[Tensor, "B"]]:
    batch = collate(items, setting.model.backbone.pad_id, setting.model.device)
    return setting.model.answer_losses(batch, RowContext("groups", embedding=embeddings))
