"""Comparison of two runs on the same data: scores of the common methods, and paired differences of predictions.

Differences are those of `statistics.compare`, on the queries that both runs answered. Writes no file.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field, TypeAdapter, ValidationError

from proper.data.dataset import Dataset
from proper.errors import DataError, RunFolderError
from proper.evaluation.comparisons import TRIVIAL
from proper.evaluation.metrics import LOSSES, METRICS, STYLE_DISTANCES, Prediction, TaskInfo, TaskKind
from proper.evaluation.results import plain
from proper.evaluation.runner import read_predictions
from proper.evaluation.statistics import DEFAULT_EFFORT, Effort, compare, holm, user_scores
from proper.json_records import REMOVE_IT, first_problem, read_record
from proper.run_folder import RunFolder, Tier

COMPARED = (
    *("difference", "relative", "ci95", "p_value", "p_adjusted", "test", "resolvable", "users", "queries"),
    *("paired_first", "paired_second"),
)
"""Keys of a difference in a row."""

Seeds = Sequence[Sequence[Prediction]]
"""One method's predictions of every seed, the same queries in each."""


@dataclass(frozen=True)
class _Run:
    seeds: Annotated[list[int], Field(min_length=1)]


@dataclass(frozen=True)
class _Task:
    name: str
    kind: TaskKind


@dataclass(frozen=True)
class _MetricValue:
    method: str
    metric: str
    primary: bool
    higher_is_better: bool
    value: float | None
    ci95: list[float | None] | None


@dataclass(frozen=True)
class _Comparable:
    """The keys of `results.json` that a comparison uses."""

    run: _Run
    task: _Task
    metrics: list[_MetricValue]


_COMPARABLE = TypeAdapter(_Comparable)


@dataclass(frozen=True)
class RunSide:
    """One of the two runs: its folder and its results."""

    folder: Path
    results: Mapping[str, Any]

    @classmethod
    def of(cls, folder: Path) -> RunSide:
        """Read a run folder.

        Raises:
            RunFolderError: the run has not been evaluated, or its results lack what is compared.
        """
        path = RunFolder(folder).results
        if not path.is_file():
            raise RunFolderError(f"{path}: no such file; 'proper evaluate {folder}' makes it")
        found = read_record(path, REMOVE_IT)
        try:
            _COMPARABLE.validate_python(found)
        except ValidationError as error:
            raise RunFolderError(f"{path}: {first_problem(error)}; {REMOVE_IT}") from error
        return cls(folder, found)

    @property
    def seeds(self) -> list[int]:
        """The seeds of the run; the seed of the run folder itself is the first."""
        return [int(seed) for seed in self.results["run"]["seeds"]]

    def task(self) -> TaskInfo | None:
        """Return the task with its labels, which are read from the prepared data; None if that is missing."""
        path = RunFolder(self.folder).data
        if not path.is_file():
            return None
        task = self.results["task"]
        with Dataset.open(path) as dataset:
            return TaskInfo(task["name"], task["kind"], tuple(dataset.labels), dataset.given_split)

    def predictions(self, method: str, seed: int) -> list[Prediction] | None:
        """Return a method's predictions of one seed; None if they were not kept.

        Methods without training answer once for all seeds, in the folder of the first.
        """
        run, first = RunFolder(self.folder), seed == self.seeds[0] or method.partition("[")[0] in (Tier.BASE, *TRIVIAL)
        path = (run if first else run.seed(seed)).predictions_of(method)
        return read_predictions(path) if path.is_file() else None


def compare_runs(first: Path, second: Path, effort: Effort = DEFAULT_EFFORT) -> dict[str, Any]:
    """Return `{"task", "seeds", "rows", "missing"}`: one row per method and metric that both scored.

    A row holds `first` and `second` (`value`, `ci95`, as in each results.json), and `difference` with `ci95`,
    `p_value`, `p_adjusted` and the rest of a comparison (first minus second), None if it could not be paired.
    `seeds` are the pairs of seeds that were compared; `missing` gives by method the reason for a missing difference.

    Raises:
        RunFolderError: a run has not been evaluated.
        DataError: the runs are of different tasks or data; the message says which.
    """
    sides = (RunSide.of(first), RunSide.of(second))
    _require_same_data(*sides)
    task, seeds = sides[0].task(), _seed_pairs(*sides)
    rows: list[dict[str, Any]] = []
    missing: dict[str, str] = {}
    for method in _common(sides):
        pair = _paired(sides, method, seeds) if task is not None else "its prepared data is missing"
        if isinstance(pair, str):
            missing[method] = pair
        rows += _rows(sides, method, task, None if isinstance(pair, str) else pair, effort)
    _adjust(rows)
    found: dict[str, Any] = plain({"task": sides[0].results["task"], "seeds": seeds, "rows": rows, "missing": missing})
    return found


def _require_same_data(one: RunSide, other: RunSide) -> None:
    if "tasks" in one.results or "tasks" in other.results:
        raise DataError(f"{one.folder} and {other.folder}: runs of several tasks cannot be compared side by side")
    for key in ("name", "kind"):
        left, right = one.results["task"][key], other.results["task"][key]
        if left != right:
            raise DataError(f"{one.folder} and {other.folder} are of different tasks: {key} {left!r} and {right!r}")
    left, right = (side.results["run"].get("data_sha256") for side in (one, other))
    if left != right:
        raise DataError(
            f"{one.folder} and {other.folder} are of different data: sha256 {str(left)[:12]} and {str(right)[:12]}; "
            "rows, templates, task and split must be the same"
        )


def _seed_pairs(one: RunSide, other: RunSide) -> list[tuple[int, int]]:
    """Return pairs of the seeds that both runs share; if they share none, paired in order."""
    shared = [seed for seed in one.seeds if seed in other.seeds]
    return [(seed, seed) for seed in shared] or list(zip(one.seeds, other.seeds, strict=False))


def _common(sides: tuple[RunSide, RunSide]) -> list[str]:
    left, right = ([row["method"] for row in side.results["metrics"]] for side in sides)
    return [method for method in dict.fromkeys(left) if method in right]


def _paired(sides: tuple[RunSide, RunSide], method: str, seeds: Sequence[tuple[int, int]]) -> tuple[Seeds, Seeds] | str:
    """Return both runs' answers to the queries that both have in every seed, or the reason why there are none."""
    lists: tuple[list[list[Prediction]], list[list[Prediction]]] = ([], [])
    for pair in seeds:
        for side, seed, kept in zip(sides, pair, lists, strict=True):
            rows = side.predictions(method, seed)
            if rows is None:
                return f"{side.folder.name} keeps no predictions of seed {seed}"
            kept.append(rows)
    common = set.intersection(*({_query(row) for row in rows} for rows in (*lists[0], *lists[1])))
    if not common:
        return "the two answered different queries"
    first, second = ([[row for row in rows if _query(row) in common] for rows in kept] for kept in lists)
    return first, second


def _query(row: Prediction) -> tuple[int, str, str]:
    """Return the identity of a query across runs, without the prompt, to which retrieved items may be prepended."""
    return row.id, row.user, row.target


def _rows(
    sides: tuple[RunSide, RunSide], method: str, task: TaskInfo | None, pair: tuple[Seeds, Seeds] | None, effort: Effort
) -> list[dict[str, Any]]:
    values = [{row["metric"]: row for row in side.results["metrics"] if row["method"] == method} for side in sides]
    rows = []
    for metric in (metric for metric in values[0] if metric in values[1]):
        row: dict[str, Any] = {"method": method, "metric": metric, "primary": values[0][metric]["primary"]}
        row["higher_is_better"] = values[0][metric]["higher_is_better"]
        for name, metrics in zip(("first", "second"), values, strict=True):
            row[name] = {key: metrics[metric][key] for key in ("value", "ci95")}
        paired = _difference(metric, task, pair, effort) if task is not None and pair is not None else None
        rows.append({**row, **(paired or dict.fromkeys(COMPARED))})
    return rows


def _difference(metric: str, task: TaskInfo, pair: tuple[Seeds, Seeds], effort: Effort) -> dict[str, Any] | None:
    if metric in LOSSES and not all(_finite(metric, rows) for seeds in pair for rows in seeds):
        return None
    if metric not in METRICS or metric in STYLE_DISTANCES:  # of another version, or of the users' histories
        return None
    one, other = (user_scores(metric, seeds, task) for seeds in pair)
    found = compare(one, other, effort)
    return {
        "difference": found.difference,
        "relative": found.relative,
        "ci95": [found.low, found.high],
        "p_value": found.p_value,
        "p_adjusted": found.p_value,
        "test": found.test,
        "resolvable": found.resolvable,
        "users": len(one.users),
        "queries": int(one.counts.sum()),
        "paired_first": float(one.values().mean()),
        "paired_second": float(other.values().mean()),
    }


def _finite(loss: str, rows: Sequence[Prediction]) -> bool:
    return all((value := getattr(row, loss)) is not None and math.isfinite(value) for row in rows)


def _adjust(rows: list[dict[str, Any]]) -> None:
    """Set Holm-adjusted p-values: the main metric's rows are one family, all other rows another."""
    for primary in (True, False):
        members = [row for row in rows if row["primary"] is primary and row["p_value"] is not None]
        for row, adjusted in zip(members, holm([row["p_value"] for row in members]), strict=True):
            row["p_adjusted"] = adjusted
