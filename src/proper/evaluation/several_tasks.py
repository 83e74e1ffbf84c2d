"""Joins the results of the tasks of one run, each of which is measured and tested separately."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

_OF_ONE_TASK = ("signatures", "trivial", "personalization")


def joined_results(parts: Mapping[str, dict[str, Any]]) -> dict[str, Any]:
    """Join the results of a run's tasks, by name; those of a single task, under "", are not changed.

    Rows of metrics and comparisons name their task. `task` is that of the first task; `tasks` has a row for each task,
    with its other results. A slice of a later task is called NAME: SLICE.
    """
    first = next(iter(parts.values()))
    if list(parts) == [""]:
        return first
    joined = {key: value for key, value in first.items() if key not in _OF_ONE_TASK}
    for key in ("metrics", "comparisons"):
        joined[key] = [row for part in parts.values() for row in part[key]]
    joined["slices"] = [
        {**row, "task": name, "slice": row["slice"] if part is first else f"{name}: {row['slice']}"}
        for name, part in parts.items()
        for row in part["slices"]
    ]
    joined["signatures"] = [f"{name}: {signature}" for name, part in parts.items() for signature in part["signatures"]]
    joined["tasks"] = [
        {**part["task"], **{key: part[key] for key in _OF_ONE_TASK if key in part}} for part in parts.values()
    ]
    return joined


def joined_gains(parts: Mapping[str, dict[str, Any]]) -> dict[str, Any]:
    """Join the gains by user of a run's tasks: the first task's, and all of them in `tasks`, by name."""
    first = next(iter(parts.values()))
    return first if list(parts) == [""] else {**first, "tasks": dict(parts)}
