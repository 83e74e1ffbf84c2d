"""The users of the run's own stage 3 who are nearest to a user by embedding: their trials, and their adapters.

Users fitted after training are left out, so that the order of enrolment does not matter.
"""

from __future__ import annotations

import heapq
from collections.abc import Mapping
from typing import Any

from jaxtyping import Float
from torch import Tensor
from torch.nn import functional

from proper.adapters.store import AdapterStore
from proper.errors import StoreError, UnavailableError
from proper.json_records import number
from proper.run_folder import Tier
from proper.training.tier_selection import Trial


def nearest_trials(
    store: AdapterStore, user: str, embedding: Float[Tensor, "D"], count: int
) -> list[tuple[Trial, Float[Tensor, "D"]]]:
    """Return the trials and embeddings of the nearest users, the nearest first."""
    own = functional.normalize(embedding.float(), dim=0)
    near = (
        (float(functional.normalize(head.embedding, dim=0) @ own), -at, trial, head.embedding)
        for at, (name, head, metadata) in enumerate(store.heads())
        if name != user and head.embedding.shape == own.shape and (trial := _trial(name, metadata)) is not None
    )
    found = heapq.nlargest(count, near, key=lambda entry: entry[:2])
    return [(trial, theirs) for _, _, trial, theirs in found]


def nearest_adapters(
    store: AdapterStore, user: str, embedding: Float[Tensor, "D"], count: int
) -> list[Mapping[str, Tensor]]:
    """Return the adapters of the nearest users, the nearest first."""
    own = functional.normalize(embedding.float(), dim=0)
    near = (
        (float(functional.normalize(head.embedding, dim=0) @ own), -at, name)
        for at, (name, head, metadata) in enumerate(store.heads())
        if head.tier == Tier.USERS and "history" not in metadata and name != user and head.embedding.shape == own.shape
    )
    found = list[Mapping[str, Tensor]]()
    for _, _, name in heapq.nlargest(count, near):
        try:
            record = store.get(name)
        except UnavailableError:
            raise  # a start from fewer neighbours would make the fit another one
        except StoreError:
            continue  # damaged: that user is answered without it, and others start from the rest
        found += [] if record is None or record.adapter is None else [record.adapter]
    return found


def _trial(user: str, metadata: dict[str, Any]) -> Trial | None:
    """Return the trial of the run's own stage 3; None without one, or if a figure is not a finite number."""
    if "history" in metadata:
        return None
    # Older runs stored neither the number of held-out items nor the spread.
    kept = {"held_out": 1, "spread": 0.0, **metadata}
    names = ("items", "group_loss", "user_loss", "passes", "held_out", "spread")
    found = [figure for name in names if (figure := number(kept.get(name))) is not None]
    if len(found) < len(names):
        return None
    items, group, own, passes, held_out, spread = found
    return Trial(user, int(items), group, own, int(passes), int(held_out), spread)
