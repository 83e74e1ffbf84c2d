"""Losses of several versions of a user on the same interactions, for promotion and for the search for outliers."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from statistics import fmean, variance
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from proper.adapters.store import UserRecord
from proper.data.encoder import EncodedExample
from proper.inference.model import PersonalizedModel
from proper.training.jobs import Job
from proper.training.microbatching import item_losses

MIN_EARLIER_ITEMS = 4
"""Fewest earlier interactions against which a new one can be an outlier."""

MIN_DEVIATION = 0.25
"""Least standard deviation, in nats per token, by which outliers are judged: some users' losses hardly differ."""


@dataclass(frozen=True)
class State:
    """State that answers a user: an embedding (D,), and an adapter (P,) or None on the group tier."""

    embedding: Float[Tensor, "D"]
    row: Float[Tensor, "P"] | None = None


def state_of(model: PersonalizedModel, record: UserRecord) -> State:
    """Return the state that a record is served with."""
    if record.adapter is None:
        return State(record.embedding)
    layout = model.model.user_layout(model.config.users)
    row = torch.empty(layout.width)
    layout.pack(record.adapter, row)
    return State(record.embedding, row)


Losses = tuple[Float[Tensor, "n"], Float[Tensor, "n"]]
"""Items' summed answer losses in nats, and their numbers of answer tokens (fp64)."""


def losses_of(model: PersonalizedModel, state: State, items: Sequence[EncodedExample]) -> Losses:
    """Return each item's summed answer loss in nats, as served, and its number of answer tokens (fp64).

    The model's bank is replaced; the caller restores the serving bank.
    """
    if not items:
        return torch.zeros(0, dtype=torch.float64), torch.zeros(0, dtype=torch.float64)
    own, pad = model.model, model.model.backbone.pad_id
    jobs = {0: Job("", state.embedding, (), tuple(items))}
    if state.row is None:
        found = item_losses(own, jobs, "groups", pad)
    else:
        own.add_bank(model.config.users, 1).values[0] = state.row
        found = item_losses(own, jobs, "users", pad)
    losses = found.get(0, torch.zeros(len(items), 2, dtype=torch.float64))
    return losses[:, 0], losses[:, 1]


def per_item(model: PersonalizedModel, state: State, items: Sequence[EncodedExample]) -> list[float]:
    """Return each item's loss per answer token in nats."""
    totals, tokens = losses_of(model, state, items)
    values: list[float] = (totals / tokens.clamp(min=1)).tolist()
    return values


@dataclass(frozen=True)
class Usual:
    """A user's usual loss on interactions that the model has not seen.

    Attributes:
        mean: mean over the interactions of the loss per answer token, in nats.
        variance: variance of it from one interaction to another; None if it is not known.
        items: number of interactions.
    """

    mean: float
    variance: float | None
    items: int

    @classmethod
    def of(cls, losses: Sequence[float]) -> Usual | None:
        """Return the figures of these losses; None for no losses, or if one is not finite."""
        if not losses or not all(map(math.isfinite, losses)):
            return None
        return cls(fmean(losses), variance(losses) if len(losses) > 1 else None, len(losses))

    def metadata(self) -> dict[str, Any]:
        """Return the figures for a record's metadata."""
        return asdict(self)


@dataclass(frozen=True)
class VersionComparison:
    """Losses per answer token of two states on held-out interactions, in nats.

    Attributes:
        new: number of new interactions.
        past: number of earlier ones.
        served: losses of the version in service on the new and on the earlier ones.
        updated: the same of the update.
        unknown: loss of the group model of an unknown user on the new ones.
    """

    new: int
    past: int
    served: tuple[float, float]
    updated: tuple[float, float]
    unknown: float

    @classmethod
    def of(cls, new: int, served: Losses, updated: Losses, unknown: Losses) -> VersionComparison:
        """Compare losses on the same items, of which `new` come first; the unknown user's are needed on these only."""
        parts = (slice(None, new), slice(new, None))
        before, after = ((_mean(each, parts[0]), _mean(each, parts[1])) for each in (served, updated))
        return cls(new, len(served[0]) - new, before, after, _mean(unknown, parts[0]))

    @property
    def gain(self) -> float:
        """Decrease of the loss on new interactions."""
        return self.served[0] - self.updated[0]

    @property
    def forgotten(self) -> float:
        """Increase of the loss on earlier interactions; 0 if it falls."""
        return max(0.0, self.updated[1] - self.served[1]) if self.past else 0.0

    def is_better(self, past: float) -> bool:
        """Return whether the loss on new interactions falls, by more than `past` times its increase on earlier ones.

        It must also be below that of an unknown user. With random answers, an update lowers the loss of a version
        that was confident of other answers, but learns nothing about the user.
        """
        return self.gain > past * self.forgotten and self.updated[0] < self.unknown

    def text(self) -> str:
        """Return the losses in words."""
        text = f"loss on {self.new} held-out new interactions {self.served[0]:.3f} -> {self.updated[0]:.3f}"
        if self.past:
            text += f", on {self.past} earlier ones {self.served[1]:.3f} -> {self.updated[1]:.3f}"
        return f"{text} nats per token (unknown user: {self.unknown:.3f})"

    def metrics(self) -> Mapping[str, Any]:
        """Return the figures under the keys that a record's metadata has."""
        return {
            "held_out": {"new": self.new, "past": self.past},
            "served_loss": {"new": self.served[0], "past": self.served[1]},
            "updated_loss": {"new": self.updated[0], "past": self.updated[1]},
            "unknown_loss": {"new": self.unknown},
        }


def outliers(
    model: PersonalizedModel,
    past: Sequence[EncodedExample],
    new: Sequence[EncodedExample],
    limit: float,
    mean: Float[Tensor, "D"],
) -> list[int]:
    """Return the indices of new items whose answers do not fit their inputs, by the group model of an unknown user.

    These are items whose loss is more than `limit` standard deviations above the mean of the user's earlier items under
    the same model. That model does not use the user's state, so a change to habits of other users is not an outlier.
    """
    if len(past) < MIN_EARLIER_ITEMS or not new:
        return []
    state = State(mean)
    usual = Usual.of(per_item(model, state, past))
    if usual is None:
        return []
    most = usual.mean + limit * max(MIN_DEVIATION, math.sqrt(usual.variance or 0.0))
    return [at for at, loss in enumerate(per_item(model, state, new)) if not loss <= most]


def _mean(losses: Losses, part: slice) -> float:
    totals, tokens = losses[0][part], losses[1][part]
    return float(totals.sum() / tokens.sum()) if len(totals) else 0.0
