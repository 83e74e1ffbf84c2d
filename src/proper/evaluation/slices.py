"""Sliced metrics: scores on subsets of users or queries, such as short histories, items of other users, new users.

Intervals are over the users of a slice.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

import numpy as np

from proper.evaluation.statistics import Effort, UserScores, estimate


def history_slices(histories: Mapping[str, int]) -> dict[str, list[str]]:
    """Return the users of each slice, sorted by history and id; empty slices are left out.

    `history-q1` (shortest) to `history-q4`: quartiles; users with equal history lengths stay together.
    `bottom-100`: the 100 users with the shortest histories (all users if there are fewer), ties by id.
    `under-10`: users with fewer than 10 interactions.
    """
    ordered = sorted(histories, key=lambda user: (histories[user], user))
    if not ordered:
        return {}
    lengths = np.asarray([histories[user] for user in ordered], dtype=np.float64)
    quartile = np.searchsorted(np.quantile(lengths, [0.25, 0.5, 0.75]), lengths, side="left")
    slices = {
        f"history-q{part + 1}": [user for user, quarter in zip(ordered, quartile, strict=True) if quarter == part]
        for part in range(4)
    }
    slices["bottom-100"] = ordered[:100]
    slices["under-10"] = [user for user in ordered if histories[user] < 10]
    return {name: users for name, users in slices.items() if users}


def slice_rows(
    scores: Mapping[tuple[str, str], UserScores],
    histories: Mapping[str, int],
    effort: Effort,
    more: Mapping[str, Collection[str]] | None = None,
) -> list[dict[str, Any]]:
    """Return the `slices` of `results.json`: one row per slice, method and metric.

    `scores` is keyed by (method, metric); `more` are further slices of users. Each row also has its number of queries
    and its shortest and longest history, `"history": [low, high]`.
    """
    rows = []
    others = {name: [user for user in histories if user in users] for name, users in (more or {}).items()}
    for name, users in {**history_slices(histories), **others}.items():
        parts = {key: whole.only(set(users)) for key, whole in scores.items()} if users else {}
        rows += part_rows(name, parts, histories, effort)
    return rows


def part_rows(
    name: str, scores: Mapping[tuple[str, str], UserScores], histories: Mapping[str, int], effort: Effort
) -> list[dict[str, Any]]:
    """Return one slice's rows from scores computed on only its queries."""
    rows = []
    for (method, metric), part in scores.items():
        if not part.users:  # a distance of styles, where no user of the slice has a history
            continue
        found = estimate(part, effort)
        lengths = [histories[user] for user in part.users]
        rows.append(
            {
                "slice": name,
                "method": method,
                "metric": metric,
                "value": found.value,
                "value_users": found.value_users,
                "ci95": [found.low, found.high],
                "users": len(part.users),
                "queries": int(part.counts.sum()),
                "history": [min(lengths), max(lengths)],
            }
        )
    return rows
