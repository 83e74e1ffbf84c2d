"""Oracle bounds for demo data: the share of the gain allowed by the planted truth that each stage reached.

The truth file contains, for every item, the best answer of an oracle that knows only the population, the user's group,
or the user. Scored on the same queries as the methods, these oracles bound each stage.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from proper.errors import DataError, ProperError
from proper.evaluation.metrics import METRICS, TASK_METRICS, Prediction, TaskInfo, score
from proper.files import read_json
from proper.run_folder import Stage

logger = logging.getLogger(__name__)

LEVELS = tuple(map(str, Stage))
"""What an oracle knows: the population, the user's group, or the user."""


@dataclass(frozen=True, slots=True)
class TruthShares:
    """The planted truth: the metric, each user's group, and per item the best answer at each level."""

    metric: str
    groups: Mapping[str, int]
    n_groups: int
    answers: Mapping[str, Mapping[str, str]]


def read_truth(path: Path) -> TruthShares:
    """Read a `truth.json`.

    Raises:
        DataError: the file is missing, is not JSON or lacks a key; the message names file and key.
    """
    try:
        raw = read_json(path)
    except ProperError as error:
        raise DataError(str(error)) from error
    for key, kind in (("metric", str), ("groups", dict), ("n_groups", int), ("answers", dict)):
        if not isinstance(raw, dict) or not isinstance(raw.get(key), kind):
            raise DataError(f"{path}: {key}: is missing or is no {kind.__name__}")
    if raw["metric"] not in METRICS:
        raise DataError(f"{path}: metric: {raw['metric']!r} is not known; known are {', '.join(METRICS)}")
    return TruthShares(raw["metric"], raw["groups"], raw["n_groups"], raw["answers"])


def truth_of_data(data: Path, own: Path) -> TruthShares | None:
    """Return the truth in the file beside the data, if there is one; a file of that name that is no truth is ignored.

    Args:
        data: the file of the interactions.
        own: where the truth of the run's own demo data is.

    Raises:
        DataError: the run's own file is damaged.
    """
    path = data.with_name(own.name)
    if not path.is_file():
        return None
    try:
        return read_truth(path)
    except DataError as error:
        if path.resolve() == own.resolve():
            raise
        logger.warning(f"{error}; the file is not used")
        return None


def fits(truth: TruthShares, predictions: Sequence[Prediction], task: TaskInfo) -> bool:
    """Return whether the truth is of these queries and of a metric of their task: the data may have been changed."""
    known = all(set(LEVELS) <= set(truth.answers.get(str(row.item), ())) for row in predictions)
    return known and truth.metric in TASK_METRICS[task.kind]


def oracle(truth: TruthShares, level: str, predictions: Sequence[Prediction]) -> list[Prediction]:
    """Return the same queries answered by the oracle of `level`.

    Raises:
        DataError: a query has no item id, or its item has no answer at this level.
    """
    answered = []
    for row in predictions:
        answers = truth.answers.get(row.item) if row.item is not None else None
        if answers is None or level not in answers:
            raise DataError(f"query {row.id} of user {row.user}: item {row.item} has no {level} answer in the truth")
        answered.append(replace(row, prediction=answers[level], loss=None))
    return answered


def truth_section(
    truth: TruthShares,
    predictions: Mapping[int, Mapping[str, Sequence[Prediction]]],
    task: TaskInfo,
    nmi: float | None = None,
) -> dict[str, Any]:
    """Return the `truth` of `results.json`.

    `allowed` is each oracle's value, `measured` each stage's (averaged over seeds), `won` the share of the allowed
    step: `(m_groups - m_population) / (t_groups - t_population)`, likewise for users. A share can exceed 1 if the
    stage below scored less than its own oracle; it is None if a stage is missing or the truth allows no gain.

    Args:
        truth: from `read_truth`.
        predictions: by seed, then by method.
        task: name, kind and labels.
        nmi: agreement of k-means clusters on the gates with the groups, see `routing.group_nmi`.

    Raises:
        DataError: there are no predictions, or a query's item is not in the truth.
    """
    seeds = list(predictions.values())
    rows = next((rows for methods in seeds for rows in methods.values() if rows), None)
    if rows is None:
        raise DataError("truth: no predictions to compare with")
    allowed = {level: score(truth.metric, oracle(truth, level, rows), task) for level in LEVELS}
    measured = {
        level: math.fsum(score(truth.metric, methods[level], task) for methods in seeds) / len(seeds)
        for level in LEVELS
        if all(level in methods for methods in seeds)
    }
    won = {
        "groups": _share("groups", "population", measured, allowed),
        "users": _share("users", "groups", measured, allowed),
    }
    return {"metric": truth.metric, "allowed": allowed, "measured": measured, "won": won, "nmi": nmi}


def _share(level: str, below: str, measured: Mapping[str, float], allowed: Mapping[str, float]) -> float | None:
    possible = allowed[level] - allowed[below]
    if level not in measured or below not in measured or possible == 0:
        return None
    return (measured[level] - measured[below]) / possible
