"""Inference with PEFT's Poly: every row uses its own user's mixture of skills.

A user without logits (unknown, or without rows in training) gets the mean of the other users' logits, as an unknown
user of the group model gets the mean embedding.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

from proper.adapters.store import AdapterStore
from proper.config import Config
from proper.data.batching import Encoder
from proper.evaluation.runner import MethodRun, predict
from proper.layers.batch_context import RowContext
from proper.methods.spec import TrainedRun
from proper.models.backbone import configured_backbone
from proper.models.checkpoints import load_tensors
from proper.models.peft_merge import apply_population
from proper.models.personal import ProperModel
from proper.models.poly import add_poly
from proper.run_folder import RunFolder, Tier


@dataclass(frozen=True)
class PolyModel:
    """A `BatchModel` that selects each row's mixture by Poly's task id.

    Attributes:
        tasks: task id of every user with logits; all other users have the task `last`.
    """

    model: ProperModel
    encoder: Encoder
    config: Config
    tasks: Mapping[str, int]

    @property
    def last(self) -> int:
        """The task id with the mean logits."""
        return len(self.tasks)

    def tier(self, user: str | None) -> Tier:
        """Return GROUPS for a user with own logits, else NONE."""
        return Tier.GROUPS if user in self.tasks else Tier.NONE

    def rows(self, users: Sequence[str | None]) -> RowContext:
        """Return each row's task id."""
        own = [self.last if user is None else self.tasks.get(user, self.last) for user in users]
        return RowContext(slots=torch.tensor(own, device=self.model.device))


def load_poly(place: TrainedRun) -> PolyModel:
    """Load the backbone, its population, and Poly with the logits of the target users."""
    config, run = place.config, RunFolder(place.folder)
    backbone = configured_backbone(config)
    apply_population(backbone, run.population)
    model, store = ProperModel(backbone), AdapterStore(run.users.path)
    heads = {user.id: head for user in place.dataset.users("target") if (head := store.head(user.id)) is not None}
    store.close()
    tensors, _ = load_tensors(run.poly)
    poly = add_poly(model, config.groups, len(heads) + 1, seed=0)
    for name, parameter in poly.skills().items():
        parameter.data.copy_(tensors[name])
    logits = [*(head.embedding for head in heads.values()), tensors["mean_logits"]]
    poly.put(torch.arange(len(logits)), torch.stack(logits))
    encoder = backbone.encoder(config.compute.max_length)
    return PolyModel(model, encoder, config, {user: at for at, user in enumerate(heads)})


def with_poly(place: TrainedRun) -> MethodRun:
    """Answer every query with Poly."""
    return predict(load_poly(place), place.dataset, place.config.task, f"poly, {place.folder.name}")
