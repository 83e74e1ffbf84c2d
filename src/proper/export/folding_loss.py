"""Loss of folding: answer loss of users' models, exact and folded, on items left out of the gates' average."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from proper.adapters.store import AdapterStore
from proper.data.batching import by_length, collate
from proper.data.dataset import Dataset
from proper.data.histories import TextExample
from proper.export.converted_models import fold_all, temporary_store
from proper.inference.model import PersonalizedModel

HELD = 5
"""Divisor for the number of held-out items of a history, the newest ones; at least one item is held out."""


def folding_loss(model: PersonalizedModel, dataset: Dataset, sample: int) -> dict[str, Any] | None:
    """Return the loss per answer token of exact and folded models on a sample; `model` is unusable afterwards.

    The newest fifth of each sampled user's history is held out from the gates' average. The adapter was trained on
    these items in both forms, so the losses are lower than on new items, and only their difference means something. The
    sample is every n-th target user with two items or more.

    Returns:
        {"users", "items", "exact", "folded", "difference", "ci95"}: nats per answer token, users weighted equally, and
        the normal interval of the users' mean difference (None of one user); None if no user has two items.
    """
    assert model.store is not None
    found = [user.id for user in dataset.users("target") if user.history > 1 and model.store.head(user.id) is not None]
    users = found[:: max(1, len(found) // max(1, sample))][:sample]
    if not users:
        return None
    newest = model.config.users.max_items
    histories = {user: dataset.history(user, newest) for user in users}
    held = {user: items[-max(1, len(items) // HELD) :] for user, items in histories.items()}
    exact = [mean_loss(model, user, held[user]) for user in users]
    with temporary_store() as store:
        folded = _folded(model, histories, held, store)
    differences = np.array(folded) - np.array(exact)
    mean, interval = float(differences.mean()), None
    if len(users) > 1:
        wide = 1.96 * float(differences.std(ddof=1)) / len(users) ** 0.5
        interval = [round(mean - wide, 4), round(mean + wide, 4)]
    return {
        "users": len(users),
        "items": sum(map(len, held.values())),
        "exact": round(float(np.mean(exact)), 4),
        "folded": round(float(np.mean(folded)), 4),
        "difference": round(mean, 4),
        "ci95": interval,
    }


def mean_loss(model: PersonalizedModel, user: str, items: Sequence[TextExample]) -> float:
    """Return the loss per answer token of a user's model on these items, in nats."""
    encoded = [model.encoder.encode(item) for item in items]
    backbone, losses, tokens = model.model.backbone, 0.0, 0.0
    for chunk in by_length([len(row.ids) for row in encoded], model.config.compute.batch_size, backbone.batch_tokens):
        batch = collate([encoded[at] for at in chunk], backbone.pad_id, model.model.device)
        with torch.no_grad():
            sums, counts = model.model.answer_losses(batch, model.rows([user] * len(chunk)))
        losses, tokens = losses + float(sums.double().sum()), tokens + float(counts.sum())
    return losses / tokens


def _folded(
    model: PersonalizedModel,
    histories: dict[str, list[TextExample]],
    held: dict[str, list[TextExample]],
    store: AdapterStore,
) -> list[float]:
    """Return the users' losses in the folded form, with gates averaged over what is not held out."""
    plain = fold_all(model, list(histories), lambda user: histories[user][: -len(held[user])], store)
    return [mean_loss(plain, user, items) for user, items in held.items()]
