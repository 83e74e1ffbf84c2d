"""Scores of all methods on all metrics of a task, from predictions by seed and method."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace

import numpy as np

from proper.errors import DataError
from proper.evaluation.metrics import (
    LOSSES,
    STYLE_DISTANCES,
    STYLE_METRICS,
    TASK_METRICS,
    Prediction,
    TaskInfo,
    get_metric,
)
from proper.evaluation.statistics import UserScores, user_scores
from proper.evaluation.style import Habits, distances, habits_of

Predictions = Mapping[int, Mapping[str, Sequence[Prediction]]]
"""Predictions by seed, then by method; all methods answer the same queries."""


def score_all(
    predictions: Predictions, task: TaskInfo, habits: Mapping[str, Habits] | None = None
) -> dict[tuple[str, str], UserScores]:
    """Score every method on every metric of the task, and on each loss that all its predictions have as a number.

    For free text also the measures of style; those of distance are over the users in `habits`, the users' own habits by
    id. A user without a history has none.
    """
    seeds = list(predictions.values())
    scores = {}
    for method in seeds[0]:
        rows = [row for methods in seeds for row in methods[method]]
        losses = [name for name in LOSSES if all(_is_finite(getattr(row, name)) for row in rows)]
        style = STYLE_METRICS if task.kind == "generation" else ()
        for name in [*TASK_METRICS[task.kind], *losses, *style]:
            scores[method, name] = scores_of(name, method, predictions, task)
        known = scores[method, style[0]].only(habits) if style and habits else None
        if known is not None and known.users:
            for name in STYLE_DISTANCES:
                scores[method, name] = _distances(name, known, method, predictions, habits or {})
    return scores


def scores_of(name: str, method: str, predictions: Predictions, task: TaskInfo) -> UserScores:
    """Return one method's scores on one metric."""
    return user_scores(name, [methods[method] for methods in predictions.values()], task)


def require_ids(name: str, predictions: Sequence[Prediction], golds: Iterable[int]) -> None:
    """Check that `predictions` cover exactly the ids in `golds`, each once.

    Raises:
        DataError: an id is missing, unknown or duplicate; the message names the method `name`.
    """
    wanted, found = set(golds), [row.id for row in predictions]
    have = set(found)
    missing, unknown = sorted(wanted - have), sorted(have - wanted)
    if missing:
        raise DataError(f"predictions of {name}: {len(missing)} queries are not answered, the first is {missing[0]}")
    if unknown:
        raise DataError(f"predictions of {name}: {len(unknown)} ids are no queries, the first is {unknown[0]}")
    if len(found) != len(have):
        twice = Counter(found).most_common(1)[0][0]
        raise DataError(f"predictions of {name}: query {twice} is answered twice")


def _distances(
    name: str, like: UserScores, method: str, predictions: Predictions, habits: Mapping[str, Habits]
) -> UserScores:
    """Return each user's distance, weighted by their queries: every query counts as much, as for the other metrics."""
    sums = np.zeros_like(like.sums)
    for seed, methods in enumerate(predictions.values()):
        answers: dict[str, list[str]] = {user: [] for user in like.users}
        for row in methods[method]:
            if row.user in answers:
                answers[row.user].append(row.prediction)
        for at, user in enumerate(like.users):
            sums[seed, at, 0] = distances(habits[user], habits_of(answers[user]))[name] * like.counts[at]
    return replace(like, metric=get_metric(name), sums=sums)


def _is_finite(value: float | None) -> bool:
    return value is not None and math.isfinite(value)
