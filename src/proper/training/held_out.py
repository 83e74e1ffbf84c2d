"""Held-out losses of trials: of every item, at several scales of the adapter, with the spread of the items' gains."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from jaxtyping import Float
from torch import Tensor

from proper.layers.bank import AdapterBank
from proper.models.personal import ProperModel
from proper.training.jobs import FitProgress, Job
from proper.training.microbatching import item_losses

LossesAtScales = dict[float, dict[int, Float[Tensor, "n 2"]]]
"""By scale and slot, each held-out item's summed loss and its number of answer tokens."""


def losses_at_scales(
    model: ProperModel, bank: AdapterBank, jobs: Mapping[int, Job], scales: set[float], pad: int
) -> LossesAtScales:
    """Return the losses of the slots' held-out items with the bank's adapters times each scale."""
    full, found = bank.scale, {}
    try:
        for scale in sorted(scales):
            bank.scale = full * scale
            found[scale] = item_losses(model, jobs, "fit", pad)
    finally:
        bank.scale = full
    return found


def record_losses(state: FitProgress, job: Job, losses: Mapping[float, Float[Tensor, "n 2"]]) -> float:
    """Add a measurement to a job's progress and return the loss per token at scale 1; the first is before training."""
    loss = per_token(losses[1.0 if state.losses else job.reference])
    if not state.losses:
        state.before = losses[job.reference].tolist()
    else:
        before = torch.tensor(state.before, dtype=torch.float64)
        state.grid.append([per_token(losses[scale]) for scale in job.scales])
        state.spreads.append([spread(before, losses[scale]) for scale in job.scales])
    state.losses.append(loss)
    return loss


def per_token(losses: Float[Tensor, "n 2"]) -> float:
    """Return the loss per answer token of items given as `item_losses` returns them."""
    total, tokens = losses.sum(0).tolist()
    return float(total / tokens)


def spread(before: Float[Tensor, "n 2"], after: Float[Tensor, "n 2"]) -> float:
    """Return the sum of squared deviations of the items' gains from the mean gain per token.

    An item's gain is its loss `before` minus that `after`, minus the mean gain per token times its tokens, in units of
    the mean number of tokens; so the sum over n - 1, over n, estimates the variance of the mean gain per token.
    """
    gains, tokens = before[:, 0] - after[:, 0], before[:, 1]
    deviations = gains - gains.sum() / tokens.sum() * tokens
    return float(((deviations / tokens.mean()) ** 2).sum())


def item_variance(losses: Float[Tensor, "n 2"]) -> float | None:
    """Return the variance over items of the loss per answer token; None with one item."""
    values = losses[:, 0] / losses[:, 1].clamp(min=1)
    return float(values.var()) if len(values) > 1 else None
