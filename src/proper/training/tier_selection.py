"""Tier selection: a user gets an adapter if it lowers the loss on the user's own held-out items; group-tier records.

The gain is the decrease of the held-out loss per answer token from the group tier to the served form of the adapter.
Below `pool_below` items, one user's held-out part is too small for a decision, so the gain is pooled over the users
with the nearest embeddings.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional

from proper.adapters.serialization import is_sound
from proper.adapters.store import UserRecord
from proper.config import TiersConfig
from proper.run_folder import Tier

BLOCK = 256
"""Number of users per chunk of the nearest-neighbour search."""


@dataclass(frozen=True, slots=True)
class Trial:
    """Held-out results of one user's trial adapter.

    Attributes:
        items: length of the history, held-out items included.
        group_loss: held-out loss per token on the group tier.
        user_loss: held-out loss per token with the adapter, in the served form.
        passes: number of passes over the items after which the adapter was best.
    """

    user: str
    items: int
    group_loss: float
    user_loss: float
    passes: int

    @property
    def gain(self) -> float:
        """Decrease of the loss by the adapter, in nats per token."""
        return self.group_loss - self.user_loss


@dataclass(frozen=True, slots=True)
class Decision:
    """Whether a user gets an adapter, and the reason as text."""

    user: str
    up: bool
    reason: str
    pooled: bool = False


Others = Callable[[Float[Tensor, "U D"]], Sequence[tuple[Trial, Float[Tensor, "D"]]]]
"""Function from the embeddings of the stage's users to the trials and embeddings of further users near them."""


def no_others(embeddings: Float[Tensor, "U D"]) -> Sequence[tuple[Trial, Float[Tensor, "D"]]]:
    """Return no further users; the default of `UserStage.others`."""
    return ()


def decide(trials: Sequence[Trial], embeddings: Float[Tensor, "U D"], config: TiersConfig) -> list[Decision]:
    """Decide the tier of every user; `embeddings` are in the order of `trials`."""
    if not trials:
        return []
    near = iter(_pooled_gains(trials, embeddings, config))
    decisions = []
    for trial in trials:
        if trial.passes == 0:
            decisions.append(Decision(trial.user, False, "no pass over the history lowered the held-out loss"))
        elif trial.items < config.pool_below:
            gain = next(near)
            what = "helps" if gain > 0 else "does not help"
            reason = f"an adapter {what} users with similar histories"
            decisions.append(Decision(trial.user, gain > 0, reason, pooled=True))
        else:
            what = "lowers" if trial.gain > 0 else "does not lower"
            decisions.append(Decision(trial.user, trial.gain > 0, f"the adapter {what} the held-out loss"))
    return decisions


def _pooled_gains(trials: Sequence[Trial], embeddings: Float[Tensor, "U D"], config: TiersConfig) -> Iterator[float]:
    """Yield, for every user whose decision is pooled, the mean gain of the nearest users."""
    gains = torch.tensor([trial.gain for trial in trials])
    unit = functional.normalize(embeddings.float(), dim=1)
    pooled = [at for at, trial in enumerate(trials) if trial.passes > 0 and trial.items < config.pool_below]
    for at in range(0, len(pooled), BLOCK):
        near = (unit[pooled[at : at + BLOCK]] @ unit.T).topk(min(config.neighbours, len(trials))).indices
        yield from gains[near].mean(1).tolist()


def refused(
    embeddings: Float[Tensor, "U D"],
    user: str,
    embedding: Float[Tensor, "D"],
    reason: str | None,
    metadata: Mapping[str, Any],
) -> UserRecord:
    """Return the group-tier record of a user in quarantine; `embeddings` as for `storable`."""
    decision = {"user": user, "up": False, "reason": reason}
    return UserRecord(user, Tier.GROUPS, storable(embeddings, embedding), None, {**metadata, **decision})


def storable(embeddings: Float[Tensor, "U D"], embedding: Float[Tensor, "D"]) -> Float[Tensor, "D"]:
    """Return a user's embedding or, if the store would reject it, the mean of all embeddings that it would accept."""
    if is_sound(embedding):
        return embedding
    return torch.stack([other for other in embeddings if is_sound(other)] or [torch.zeros_like(embedding)]).mean(0)
