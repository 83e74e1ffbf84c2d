"""Held-out losses of adapters in a model's bank, for tests of what training records."""

from __future__ import annotations

from collections.abc import Mapping

from proper.layers.batch_context import Mode
from proper.models.personal import ProperModel
from proper.training.held_out import per_token
from proper.training.jobs import Job
from proper.training.microbatching import item_losses


def held_out_losses(model: ProperModel, jobs: Mapping[int, Job], mode: Mode, pad: int) -> dict[int, float]:
    """The held-out loss per answer token (nats) of each slot's job."""
    return {slot: per_token(losses) for slot, losses in item_losses(model, jobs, mode, pad).items()}
