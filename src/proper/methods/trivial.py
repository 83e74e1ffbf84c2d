"""Majority baselines without a model: the usual answer in the user's history, or in all histories.

Labels: the most frequent one. Ratings: the mean, rounded to the nearest rating of the scale. Free text: the most
frequent one, or the newest if all differ.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from statistics import fmean

from proper.data.dataset import Dataset, TextExample
from proper.evaluation.runner import MethodRun, prediction_of
from proper.methods.spec import TrainedRun


def user_majority(place: TrainedRun) -> MethodRun:
    """Answer every query with its user's most frequent or mean answer."""
    return _answer(place, own=True)


def global_majority(place: TrainedRun) -> MethodRun:
    """Answer every query with the most frequent or mean answer of all users."""
    return _answer(place, own=False)


def usual(counts: Mapping[str, int], kind: str, labels: Sequence[str]) -> str:
    """Return the usual answer from `counts` (answer to frequency, newest last); "" if `counts` is empty."""
    if not counts:
        return ""
    if kind == "rating":
        mean = fmean(map(float, counts), counts.values())
        # A mean exactly between two ratings rounds down, by convention.
        return min(labels, key=lambda label: (abs(float(label) - mean), float(label)))
    most = max(counts.values())
    return [answer for answer, count in counts.items() if count == most][-1]


def _answer(place: TrainedRun, *, own: bool) -> MethodRun:
    started = time.perf_counter()
    dataset, kind = place.dataset, place.config.task.kind
    answers: dict[str, str] = {}
    overall = "" if own else usual(_all_targets(dataset), kind, dataset.labels)
    found = []
    histories = {user.id: user.history for user in dataset.users("target")}
    for query in dataset.queries():
        if own and query.user not in answers:
            answers[query.user] = usual(_counts(dataset.history(query.user)), kind, dataset.labels)
        found.append(prediction_of(query, answers.get(query.user, overall), "trivial", histories.get(query.user, 0)))
    return MethodRun(found, max(time.perf_counter() - started, 1e-9), 0)


def _counts(history: Sequence[TextExample]) -> dict[str, int]:
    """Count answers, in the order of their last occurrence."""
    counts: dict[str, int] = {}
    for item in history:
        counts[item.target] = counts.pop(item.target, 0) + 1
    return counts


def _all_targets(dataset: Dataset) -> dict[str, int]:
    """Count all users' answers in SQL, since there can be as many as rows; for free text keep the most frequent."""
    found = dataset.connection.execute(
        """SELECT t.target, count(*) FROM rows r CROSS JOIN texts t ON t.id = r.text WHERE r.part = 'history'
        GROUP BY t.target ORDER BY count(*) DESC, t.target LIMIT ?""",
        (-1 if dataset.labels else 1,),
    )
    return dict(reversed(found.fetchall()))
