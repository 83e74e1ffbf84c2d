"""Assembly of `results.json` and `users.json` from predictions: scores, comparisons, slices and gains per user.

Returns plain values and writes no file.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from statistics import median
from typing import Any

import numpy as np

from proper.errors import DataError
from proper.evaluation.comparisons import TRIVIAL, Scores, comparison_rows, default_pairs
from proper.evaluation.conclusions import against_trivial, claim, failure_signatures, one_answer
from proper.evaluation.metrics import (
    TaskInfo,
    get_metric,
    primary_metric,
)
from proper.evaluation.scoring import Predictions, require_ids, score_all, scores_of
from proper.evaluation.slices import part_rows, slice_rows
from proper.evaluation.statistics import DEFAULT_EFFORT, Effort, UserScores, estimate, standings
from proper.evaluation.style import Habits
from proper.run_folder import STAGE_METHODS, STEPS


@dataclass(frozen=True, kw_only=True)
class RawResults:
    """Measurements from which `results.json` is made.

    Attributes:
        predictions: by seed, then by method. Seeds are averaged per user before tests.
        task: name, kind and labels.
        run: backbone, versions, data_sha256, device, and other metadata of the run.
        seconds: wall time by stage.
        cost: one row per method.
        routing: from `routing.analyze_routing`.
        truth: from `truth.truth_section`, if the data has a truth file.
        history_losses: by user, the answer loss of method `users` on that user's own history, to detect overfitting.
        pairs: further (method, against) pairs to compare, beside those of `default_pairs`.
        user_slices: further slices by name, as sets of users.
        query_slices: slices by name, as sets of query ids.
        habits: by user, the style of the answers in their history, for tasks with free text.
    """

    predictions: Predictions
    task: TaskInfo
    run: Mapping[str, Any]
    seconds: Mapping[str, float]
    cost: Sequence[Mapping[str, Any]] = ()
    routing: Mapping[str, Any] = field(default_factory=dict)
    truth: Mapping[str, Any] | None = None
    history_losses: Mapping[str, float] = field(default_factory=dict)
    pairs: Sequence[tuple[str, str]] = ()
    user_slices: Mapping[str, Collection[str]] = field(default_factory=dict)
    query_slices: Mapping[str, Collection[int]] = field(default_factory=dict)
    habits: Mapping[str, Habits] = field(default_factory=dict)

    @property
    def methods(self) -> list[str]:
        """The methods, in the given order."""
        return list(next(iter(self.predictions.values())))


def build_results(found: RawResults, effort: Effort = DEFAULT_EFFORT) -> dict[str, Any]:
    """Assemble `results.json`, schema 1, from plain values only; non-finite numbers become None.

    Raises:
        DataError: there are no predictions, or methods or seeds did not answer exactly the same queries.
    """
    histories = require_same_queries(found.predictions)
    scores = score_all(found.predictions, found.task, found.habits)
    metrics = _metric_rows(scores, found.task, effort)
    pairs = list(dict.fromkeys([*default_pairs(found.methods), *found.pairs]))
    comparisons = comparison_rows(scores, pairs, found.task, effort)
    trivial = against_trivial(metrics, comparisons)
    results = {
        "schema": 1,
        "run": {**found.run, "seeds": list(found.predictions), "seconds": dict(found.seconds)},
        "task": _task_metadata(found.task, list(histories.values()), metrics[0]["queries"]),
        "metrics": metrics,
        "comparisons": comparisons,
        "cost": [dict(row) for row in found.cost],
        "routing": dict(found.routing),
        "slices": [
            *slice_rows(scores, histories, effort, found.user_slices),
            *_query_slices(found, histories, effort),
        ],
        "signatures": _signatures(found, scores, comparisons, trivial),
        **({"truth": dict(found.truth)} if found.truth is not None else {}),
    }
    if trivial is not None:
        results["trivial"] = trivial
    claimed = claim(comparisons, trivial)
    if claimed is not None:
        results["personalization"] = claimed
    plain_results: dict[str, Any] = plain(results)
    return plain_results


def gains_by_user(predictions: Predictions, task: TaskInfo, scores: Scores | None = None) -> dict[str, Any]:
    """Return `users.json`: each user's gain at each step on the main metric, shortest history first.

    `{"metric", "higher_is_better", "users": [{"user", "history", "queries", "tier", "values": {method: value},
    "gain_groups", "gain_users"}]}`. Values are means over the user's queries and over seeds. Gains are positive for an
    improvement, also for error metrics, and None if a stage is missing. `tier` is the serving tier of method `users`,
    or of the last stage there is, in the first seed.

    Raises:
        DataError: there are no predictions, or methods or seeds did not answer exactly the same queries.
    """
    histories = require_same_queries(predictions)
    name = primary_metric(task)
    first = next(iter(predictions.values()))
    if scores is None:
        scores = {(method, name): scores_of(name, method, predictions, task) for method in first}
    last = next((stage for stage in reversed(STAGE_METHODS) if stage in first), next(iter(first)))
    tiers = {row.user: row.tier for row in first[last]}
    values = {method: scores[method, name].user_values() for method in first}
    users, counts = scores[next(iter(first)), name].users, scores[next(iter(first)), name].counts
    higher = get_metric(name).higher_is_better
    rows = []
    for index in sorted(range(len(users)), key=lambda index: (histories[users[index]], users[index])):
        own = {method: float(found[index]) for method, found in values.items()}
        rows.append(
            {
                "user": users[index],
                "history": histories[users[index]],
                "queries": int(counts[index]),
                "tier": tiers[users[index]],
                "values": own,
                **{f"gain_{step}": _gain(own, step, below, higher) for step, below in STEPS},
            }
        )
    return {"metric": name, "higher_is_better": higher, "users": rows}


def require_same_queries(predictions: Predictions) -> dict[str, int]:
    """Check that every method in every seed answered exactly the same queries; return history length by user.

    Raises:
        DataError: they did not, or there are no predictions; the message names the method and the seed.
    """
    first = next(iter(predictions.values()), {})
    reference = next(iter(first.values()), [])
    if not reference:
        raise DataError("no predictions to evaluate")
    golds = {row.id: (row.user, row.target) for row in reference}
    for seed, methods in predictions.items():
        if list(methods) != list(first):
            raise DataError(f"predictions of seed {seed} are of {', '.join(methods)}, not of {', '.join(first)}")
        for method, rows in methods.items():
            require_ids(f"{method} (seed {seed})", rows, golds)
            for row in rows:
                if golds[row.id] != (row.user, row.target):
                    raise DataError(f"predictions of {method} (seed {seed}): query {row.id} has another user or gold")
    return {row.user: row.history for row in reference}


def plain(value: Any) -> Any:
    """Convert `value` to JSON types: numpy numbers to Python's, tuples to lists, NaN and infinity to None."""
    if isinstance(value, Mapping):
        return {str(key): plain(inner) for key, inner in value.items()}
    if isinstance(value, np.ndarray):
        return plain(value.tolist())
    if isinstance(value, list | tuple):
        return [plain(inner) for inner in value]
    if isinstance(value, np.generic):
        return plain(value.item())
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _task_metadata(task: TaskInfo, lengths: Sequence[int], queries: int) -> dict[str, Any]:
    return {
        "name": task.name,
        "kind": task.kind,
        "target_users": len(lengths),
        "queries": queries,
        "history": {"min": min(lengths), "median": median(lengths), "max": max(lengths)},
    }


def _metric_rows(scores: Scores, task: TaskInfo, effort: Effort) -> list[dict[str, Any]]:
    rows = [metric_row(key, one, task, effort) for key, one in scores.items()]
    _add_standings(rows, scores, effort)
    return rows


def metric_row(key: tuple[str, str], scores: UserScores, task: TaskInfo, effort: Effort) -> dict[str, Any]:
    """Return a row of `metrics` in `results.json`, without its standing among the methods; `key` is method, metric."""
    method, name = key
    found = estimate(scores, effort)
    by_seed = [float(value) for value in scores.values()]
    return {
        "task": task.name,
        "method": method,
        "metric": name,
        "value": found.value,
        "value_users": found.value_users,
        "ci95": [found.low, found.high],
        "users": len(scores.users),
        "queries": int(scores.counts.sum()),
        "seeds": len(by_seed),
        "by_seed": by_seed,
        "higher_is_better": scores.metric.higher_is_better,
        "primary": name == primary_metric(task),
        "trivial": method in TRIVIAL,
    }


def _add_standings(rows: list[dict[str, Any]], scores: Scores, effort: Effort) -> None:
    """Set `standing` of every row: whether its method is the best on its metric, or tied with the best."""
    for name in dict.fromkeys(row["metric"] for row in rows):
        here = [row for row in rows if row["metric"] == name]
        found = standings([scores[row["method"], name] for row in here], effort)
        for row, standing in zip(here, found, strict=True):
            row["standing"] = standing


def _query_slices(found: RawResults, histories: Mapping[str, int], effort: Effort) -> list[dict[str, Any]]:
    rows = []
    for name, queries in found.query_slices.items():
        part = {
            each: {method: [row for row in answers if row.id in queries] for method, answers in by_method.items()}
            for each, by_method in found.predictions.items()
        }
        if any(answers for by_method in part.values() for answers in by_method.values()):
            rows += part_rows(name, score_all(part, found.task, found.habits), histories, effort)
    return rows


def _signatures(
    found: RawResults,
    scores: Scores,
    comparisons: Sequence[Mapping[str, Any]],
    trivial: Mapping[str, Any] | None,
) -> list[str]:
    first = next(iter(found.predictions.values()))
    constant = one_answer(first.get("population", ()), found.task.labels)
    return constant + failure_signatures(
        routing=found.routing,
        comparisons=comparisons,
        gains=gains_by_user(found.predictions, found.task, scores)["users"],
        query_losses=_query_losses(scores),
        history_losses=found.history_losses,
        trivial=trivial,
    )


def _gain(values: Mapping[str, float], step: str, below: str, higher_is_better: bool) -> float | None:
    if step not in values or below not in values:
        return None
    return values[step] - values[below] if higher_is_better else values[below] - values[step]


def _query_losses(scores: Scores) -> dict[str, float]:
    """Return the answer loss of method `users` on queries, by user; empty if it is not known."""
    found = scores.get(("users", "loss"))
    if found is None:
        return {}
    return dict(zip(found.users, (float(loss) for loss in found.user_values()), strict=True))
