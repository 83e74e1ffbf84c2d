"""Store records of users who stay on the group tier, because stage 3 gives them no adapter."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from proper.adapters.store import UserRecord
from proper.adapters.validation import is_sound
from proper.run_folder import Tier


def refused(
    embeddings: Float[Tensor, "U D"],
    user: str,
    embedding: Float[Tensor, "D"],
    reason: str | None,
    facts: Mapping[str, Any],
) -> UserRecord:
    """Return the group-tier record of a user in quarantine; `embeddings` as for `storable`."""
    told = {**facts, "user": user, "up": False, "reason": reason}
    return UserRecord(user, Tier.GROUPS, storable(embeddings, embedding), None, told)


def storable(embeddings: Float[Tensor, "U D"], embedding: Float[Tensor, "D"]) -> Float[Tensor, "D"]:
    """Return a user's embedding or, if the store would reject it, the mean of all embeddings that it would accept."""
    if is_sound(embedding):
        return embedding
    return torch.stack([other for other in embeddings if is_sound(other)] or [torch.zeros_like(embedding)]).mean(0)
