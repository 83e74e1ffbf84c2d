"""Differences between two runs by the length of the users' histories, paired by user.

    python -m experiments.histories FIRST SECOND --methods population --out FILE.json [--edges 30 60 150]

FIRST and SECOND are run folders on the same data, with predictions of the same queries, such as two ways to train
stage 1. The file has first minus second for all users and for those with histories of [0, 30), [30, 60) and so on.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

from proper.errors import ProperError
from proper.evaluation.metrics import TASK_METRICS, Prediction, TaskInfo
from proper.evaluation.side_by_side import RunSide
from proper.evaluation.statistics import compare, user_scores
from proper.files import write_json

EDGES = (30, 60, 150)


def read(folder: Path, method: str) -> tuple[list[Prediction], TaskInfo]:
    """Return a method's predictions of a run's first seed, and the task.

    Raises:
        ProperError: the run has no results, no prepared data or no predictions of the method.
    """
    side = RunSide.of(folder)
    task, found = side.task(), side.predictions(method, side.seeds[0])
    if task is None or found is None:
        raise ProperError(
            f"{folder}: no data or no predictions; 'proper evaluate {folder} --methods {method}' makes them"
        )
    return found, task


def differences(
    first: Sequence[Prediction], second: Sequence[Prediction], task: TaskInfo, edges: Sequence[int] = EDGES
) -> list[dict[str, Any]]:
    """Return a row for each metric and range of history lengths that has users; the first range is all users.

    A row has `metric`, `history` ([from, below], None for no limit), `users`, `queries`, the values of both, and the
    first minus the second with its 95 % interval and p of the paired permutation test, which is not adjusted.

    Raises:
        DataError: the two are not of the same queries.
    """
    histories = {row.user: row.history for row in first}
    limits = (0.0, *map(float, edges), math.inf)
    ranges = dict.fromkeys([(0.0, math.inf), *pairwise(limits)])  # without limits, the two are the same
    rows = []
    losses = [
        name for name in ("loss", "label_loss") if all(getattr(row, name) is not None for row in (*first, *second))
    ]
    for metric in (*TASK_METRICS[task.kind], *losses):
        one, other = (user_scores(metric, [answers], task) for answers in (first, second))
        for low, below in ranges:
            users = {user for user, length in histories.items() if low <= length < below}
            if not users:
                continue
            part, against = one.only(users), other.only(users)
            found = compare(part, against)
            rows.append(
                {
                    "metric": metric,
                    "history": [int(low), int(below) if below < math.inf else None],
                    "users": len(users),
                    "queries": int(part.counts.sum()),
                    "first": float(part.values()[0]),
                    "second": float(against.values()[0]),
                    "difference": found.difference,
                    "ci95": [found.low, found.high],
                    "p_value": found.p_value,
                }
            )
    return rows


def main() -> int:
    """Parse the command line and write the file; return the exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m experiments.histories",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("runs", type=Path, nargs=2, metavar="RUN")
    parser.add_argument("--methods", nargs="+", default=["population"], metavar="M")
    parser.add_argument("--edges", type=int, nargs="*", default=list(EDGES), metavar="N", help="limits of the ranges")
    parser.add_argument("--out", type=Path, required=True, metavar="FILE")
    arguments = parser.parse_args()
    found: dict[str, Any] = {"runs": [folder.name for folder in arguments.runs], "methods": {}}
    for method in arguments.methods:
        (first, task), (second, _) = (read(folder, method) for folder in arguments.runs)
        found["methods"][method] = differences(first, second, task, arguments.edges)
    write_json(arguments.out, found)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
