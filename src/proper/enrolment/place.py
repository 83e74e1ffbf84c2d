"""Places the embeddings of new users at once, without gradient: by the run's encoder, in one pass over all their items.

A run without an encoder (an older one, or one in which it did not help) places every new user at the mean embedding.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from proper.adapters.store import UserRecord
from proper.data.encoder import EncodedExample
from proper.enrolment.fit_embedding import EmbeddingJob, FittedEmbedding
from proper.enrolment.history import UserHistory
from proper.models.item_features import item_features
from proper.models.personal import ProperModel
from proper.models.user_encoder import UserEncoder
from proper.run_folder import Tier
from proper.training.jobs import held_out_items

FITTED = "fitted"
"""Key in a record's metadata for an embedding fitted after stage 2: the next fit refits it on the whole history."""
PLACED = "placed"
"""Key in a record's metadata for an embedding that the encoder placed, and that is not fitted yet."""

ITEMS_PER_BATCH = 2_048
"""Items whose features are in memory at once."""

UserItems = tuple[str, Sequence[EncodedExample]]
"""A user and their items, oldest first."""


@dataclass(frozen=True)
class Placer:
    """Placement of new users' embeddings.

    Attributes:
        mean: the mean embedding (D,).
        encoder: the run's encoder; None: all users are placed at the mean.
    """

    model: ProperModel
    mean: Float[Tensor, "D"]
    encoder: UserEncoder | None

    @property
    def kind(self) -> str:
        """The kind of placement: "mean", or the encoder's kind."""
        return "mean" if self.encoder is None else self.encoder.readout.kind

    def place(self, histories: Sequence[Sequence[EncodedExample]]) -> Float[Tensor, "U D"]:
        """Return the embeddings of users from their items; none depends on the other users."""
        return self.embed(self.read(histories))

    def read(self, histories: Sequence[Sequence[EncodedExample]]) -> list[Float[Tensor, "n K"]]:
        """Return the encoder's features of every user's items; without an encoder, no columns."""
        items = [item for own in histories for item in own]
        if self.encoder is None:
            return [torch.zeros(len(own), 0) for own in histories]
        found = [torch.zeros(0, len(self.encoder.pooling.center))]
        for at in range(0, len(items), ITEMS_PER_BATCH):
            found.append(self.encoder.projection(item_features(self.model, items[at : at + ITEMS_PER_BATCH])))
        return list(torch.split(torch.cat(found), [len(own) for own in histories]))

    def embed(self, phi: Sequence[Float[Tensor, "n K"]]) -> Float[Tensor, "U D"]:
        """Return the embeddings of users from what `read` returned for their items, or for some of them."""
        return self.mean.expand(len(phi), -1) if self.encoder is None else self.encoder.place(phi)


def placed_record(user: str, embedding: Float[Tensor, "D"], grown: UserHistory, kind: str) -> UserRecord:
    """Return the record of a user whose embedding was placed; `kind` is the kind of placement."""
    metadata = {
        "history": {"run": grown.run, "logged": grown.logged},
        "embedding": PLACED,
        "embedding_start": kind,
        "reason": "placed by the run's encoder, not fitted yet",
    }
    return UserRecord(user, Tier.GROUPS, embedding, None, metadata)


def fitted_metadata(placer: Placer, found: FittedEmbedding) -> dict[str, Any]:
    """Return what a record says about an embedding that was fitted from where the placer put it."""
    passes = {"embedding_passes": found.passes, "embedding_losses": list(found.losses)}
    return {"embedding": FITTED, "embedding_start": placer.kind, **passes}


def embedding_jobs(placer: Placer, users: Sequence[UserItems], validation: float) -> list[EmbeddingJob]:
    """Return the jobs that fit these users' embeddings from where they are placed.

    Args:
        placer: places the embeddings: from all items and, for the trial, from those that are not held out.
        users: the users and their items.
        validation: share of a user's items that is held out; none of a single one.
    """
    phi = placer.read([items for _, items in users])
    held = [held_out_items(len(items), validation) if len(items) > 1 else 0 for _, items in users]
    starts = placer.embed(phi)
    trial_starts = placer.embed([own[: len(own) - cut] for own, cut in zip(phi, held, strict=True)])
    return [
        EmbeddingJob(user, items, cut, start, trial_start)
        for (user, items), cut, start, trial_start in zip(users, held, starts, trial_starts, strict=True)
    ]
