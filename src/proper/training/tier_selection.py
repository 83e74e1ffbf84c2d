"""Tier selection: a user gets an adapter if it lowers the loss on held-out items of the history; group-tier records.

The gain is the decrease of the held-out loss per answer token from the group tier to the served form of the adapter.
One user's held-out items are few, so the gain is shrunk toward the mean gain m of users with similar embeddings, by
empirical Bayes (Efron & Morris 1973): with the variance s^2 / n of a mean over the user's n items, and the variance t^2
of the users' true gains,

    shrunk gain = m + t^2 / (t^2 + s^2 / n) * (gain - m)

s^2 is pooled over all users' items, and t^2 is the variance of the gains beyond what s^2 explains.
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
        passes: number of passes over the items after which it was measured.
        held_out: number of held-out items.
        spread: sum over these items of the squared deviation of the gain; see `jobs.FitProgress.spreads`.
        variance: variance over these items of the loss per token; None with one item, and in older runs.
    """

    user: str
    items: int
    group_loss: float
    user_loss: float
    passes: int
    held_out: int = 1
    spread: float = 0.0
    variance: float | None = None

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
    shrunk = shrunk_gains(trials, embeddings, config.neighbours)
    decisions = []
    for trial, gain in zip(trials, shrunk, strict=True):
        if trial.passes == 0:
            decisions.append(Decision(trial.user, False, "no pass over the history lowered the held-out loss"))
        elif config.pools(trial.items):
            what = "lowers" if gain > 0 else "does not lower"
            reason = f"the adapter {what} the held-out loss, by the user's items and those of similar users"
            decisions.append(Decision(trial.user, gain > 0, reason, pooled=True))
        else:
            what = "lowers" if trial.gain > 0 else "does not lower"
            decisions.append(Decision(trial.user, trial.gain > 0, f"the adapter {what} the held-out loss"))
    return decisions


def shrunk_gains(trials: Sequence[Trial], embeddings: Float[Tensor, "U D"], neighbours: int) -> list[float]:
    """Return every user's gain, shrunk toward the mean gain of the nearest users (see the module)."""
    gains = torch.tensor([trial.gain for trial in trials], dtype=torch.float64)
    items = torch.tensor([trial.held_out for trial in trials], dtype=torch.float64)
    degrees = float((items - 1).sum())
    between = float(gains.var()) if len(trials) > 1 else 0.0
    # If no user has a second item, noise cannot be told from differences between users: all of it counts as noise.
    noise = sum(trial.spread for trial in trials) / degrees / items if degrees else torch.full_like(items, between)
    true = max(0.0, between - float(noise.mean()))
    weights = true / (true + noise).clamp(min=1e-300)
    means = torch.cat(list(_means_of_nearest(gains, embeddings, neighbours)))
    shrunk: list[float] = (means + weights * (gains - means)).tolist()
    return shrunk


def _means_of_nearest(
    gains: Float[Tensor, "U"], embeddings: Float[Tensor, "U D"], neighbours: int
) -> Iterator[Float[Tensor, "n"]]:
    """Yield, for users in blocks, the mean gain of the users with the nearest embeddings, themselves included."""
    if neighbours >= len(gains):
        yield gains.mean().expand(len(gains))
        return
    unit = functional.normalize(embeddings.float(), dim=1)
    for at in range(0, len(gains), BLOCK):
        near = (unit[at : at + BLOCK] @ unit.T).topk(neighbours).indices
        yield gains[near].mean(1)


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
