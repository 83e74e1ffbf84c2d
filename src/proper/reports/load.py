"""Loader of a run folder's result files as plain values: missing values are None or empty, non-finite ones None.

No model is loaded.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from proper.errors import RunFolderError
from proper.reports.reading import count, interval, mapping, number, objects, read_lines, read_object
from proper.run_folder import RunFolder

EXAMPLES = 8


@dataclass(frozen=True, slots=True)
class ReportedMetric:
    """One row of `metrics`: a method's score. `interval` is the 95 % interval of `value` over users.

    `standing` is "best", "tied" with the best, or "".
    """

    task: str
    method: str
    metric: str
    value: float
    value_users: float | None
    interval: tuple[float, float] | None
    users: int | None
    queries: int | None
    seeds: int | None
    higher_is_better: bool
    primary: bool
    standing: str = ""


@dataclass(frozen=True, slots=True)
class ReportedComparison:
    """One row of `comparisons`: `method` minus `against`. `relative` is positive where `method` is better.

    `resolvable` is the minimal detectable difference with these users at 80 % power.
    """

    task: str
    method: str
    against: str
    metric: str
    difference: float
    relative: float | None
    interval: tuple[float, float] | None
    p_value: float | None
    p_adjusted: float | None
    family: str
    test: str
    primary: bool
    resolvable: float | None = None


@dataclass(frozen=True, slots=True)
class CurvePoint:
    """One optimizer step; `loss` in nats per answer token, `penalty` the constraint loss times its weight."""

    seed: int
    step: int
    loss: float
    epoch: float | None
    learning_rate: float | None
    constraint: float | None
    penalty: float | None = None


@dataclass(frozen=True, slots=True)
class RoutedUser:
    """Routing of one user: mean gates over experts, and coordinates on the two-dimensional map of embeddings."""

    user: str
    history: int | None
    gates: tuple[float, ...]
    main: int
    position: tuple[float, float] | None
    group: int | None


@dataclass(frozen=True, slots=True)
class UserGain:
    """Gains of one target user, positive if the later stage is better."""

    user: str
    history: int
    queries: int | None
    tier: str
    gain_groups: float | None
    gain_users: float | None


@dataclass(frozen=True, slots=True)
class RunFiles:
    """All data of a report, except the examples, which are read in two passes from `folder`.

    `settings` is config.yaml.
    """

    folder: Path
    results: Mapping[str, Any]
    metrics: list[ReportedMetric]
    comparisons: list[ReportedComparison]
    curves: dict[str, list[CurvePoint]]
    routed: list[RoutedUser]
    gains: list[UserGain]
    gain_metric: str
    settings: Mapping[str, Any]

    @property
    def examples(self) -> int:
        """Number of examples to show."""
        wanted = count(mapping(self.settings.get("evaluation")).get("examples"))
        return EXAMPLES if wanted is None else max(0, wanted)

    @property
    def tasks(self) -> dict[str, Mapping[str, Any]]:
        """Each task's size, `trivial` and `personalization` by name; of a run of one task, its results under ""."""
        return {str(row.get("name")): row for row in self.rows("tasks")} or {"": self.results}

    @property
    def first_task(self) -> str:
        """Name of the first of several tasks, which `users.json` and the unnamed slices are of; else ""."""
        return next(iter(self.tasks))

    def part(self, key: str) -> dict[str, Any]:
        """Return the mapping `key` of results.json; empty if it is absent."""
        return mapping(self.results.get(key))

    def rows(self, key: str) -> list[dict[str, Any]]:
        """Return the list of objects `key` of results.json; empty if it is absent."""
        return objects(self.results.get(key))


def load_run(folder: Path) -> RunFiles:
    """Read a run folder.

    Raises:
        RunFolderError: results.json is missing, or a file is not JSON; the message names file and line.
    """
    run = RunFolder(folder)
    path = run.results
    if not path.is_file():
        raise RunFolderError(f"{path}: no such file; run: proper evaluate {folder} (once the stages are trained)")
    results = read_object(path)
    users = read_object(run.user_scores)
    rows = [row for row in map(_metric, objects(results.get("metrics"))) if row]
    higher = users.get("higher_is_better") is not False
    return RunFiles(
        folder=folder,
        results=results,
        metrics=rows,
        comparisons=[row for row in map(_comparison, objects(results.get("comparisons"))) if row],
        curves=_curves(run.metrics_log),
        routed=[row for row in map(_routed, objects(read_object(run.routing).get("users"))) if row],
        gains=[_gain(row, higher) for row in objects(users.get("users"))],
        gain_metric=str(users.get("metric") or ""),
        settings=read_settings(run.config),
    )


def _metric(row: dict[str, Any]) -> ReportedMetric | None:
    value = number(row.get("value"))
    if value is None:
        return None
    return ReportedMetric(
        task=str(row.get("task") or ""),
        method=str(row.get("method")),
        metric=str(row.get("metric")),
        value=value,
        value_users=number(row.get("value_users")),
        interval=interval(row.get("ci95")),
        users=count(row.get("users")),
        queries=count(row.get("queries")),
        seeds=count(row.get("seeds")),
        higher_is_better=row.get("higher_is_better") is not False,
        primary=bool(row.get("primary")),
        standing=str(row.get("standing") or ""),
    )


def _comparison(row: dict[str, Any]) -> ReportedComparison | None:
    difference = number(row.get("difference"))
    if difference is None:
        return None
    return ReportedComparison(
        task=str(row.get("task") or ""),
        method=str(row.get("method")),
        against=str(row.get("against")),
        metric=str(row.get("metric")),
        difference=difference,
        relative=number(row.get("relative")),
        interval=interval(row.get("ci95")),
        p_value=number(row.get("p_value")),
        p_adjusted=number(row.get("p_adjusted")),
        family=str(row.get("family") or ""),
        test=str(row.get("test") or ""),
        primary=bool(row.get("primary")),
        resolvable=number(row.get("resolvable")),
    )


def _curves(path: Path) -> dict[str, list[CurvePoint]]:
    """Return points by stage, or by phase if a stage has several (`users: trial`), in order of seed and step.

    For a step that was logged twice (after a resume), the later entry counts.
    """
    stages: dict[str, dict[tuple[int, int], CurvePoint]] = {}
    for row in read_lines(path):
        step, loss, seed = count(row.get("step")), number(row.get("loss")), count(row.get("seed")) or 0
        if step is None or loss is None or not isinstance(row.get("stage"), str):
            continue
        phase = row.get("phase")
        name = row["stage"] if not isinstance(phase, str) else f"{row['stage']}: {phase.rpartition(': ')[2]}"
        values = (number(row.get(key)) for key in ("epoch", "learning_rate", "constraint", "penalty"))
        stages.setdefault(name, {})[seed, step] = CurvePoint(seed, step, loss, *values)
    return {stage: [points[key] for key in sorted(points)] for stage, points in stages.items()}


def _routed(row: dict[str, Any]) -> RoutedUser | None:
    raw = row.get("gates")
    gates = tuple(number(gate) or 0.0 for gate in raw) if isinstance(raw, list) else ()
    if not gates:
        return None
    main = count(row.get("main"))
    if main is None or not 0 <= main < len(gates):
        main = max(range(len(gates)), key=gates.__getitem__)
    x, y = number(row.get("x")), number(row.get("y"))
    position = None if x is None or y is None else (x, y)
    return RoutedUser(str(row.get("user")), count(row.get("history")), gates, main, position, count(row.get("group")))


def _gain(row: dict[str, Any], higher_is_better: bool) -> UserGain:
    raw = row.get("values")
    values = raw if isinstance(raw, dict) else {}

    def gain(key: str, method: str, against: str) -> float | None:
        reported, new, old = number(row.get(key)), number(values.get(method)), number(values.get(against))
        if reported is not None or new is None or old is None:
            return reported
        return new - old if higher_is_better else old - new

    return UserGain(
        user=str(row.get("user")),
        history=count(row.get("history")) or 0,
        queries=count(row.get("queries")),
        tier=str(row.get("tier") or "unknown"),
        gain_groups=gain("gain_groups", "groups", "population"),
        gain_users=gain("gain_users", "users", "groups"),
    )


def read_settings(path: Path) -> dict[str, Any]:
    """Return the mapping of a YAML file; empty if the file does not exist.

    Raises:
        RunFolderError: it is not readable.
    """
    try:
        config = yaml.safe_load(path.read_text(encoding="utf-8")) if path.is_file() else None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise RunFolderError(f"{path}: not readable as YAML") from error
    return mapping(config)
