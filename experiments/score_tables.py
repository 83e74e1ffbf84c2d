"""Committed tables whose cells come from several jobs and sessions.

What a job has trained is gone with its machine. A cell, a method with a seed, therefore keeps what every figure is made
of: for each metric, the sums over each user's queries (`UserScores.sums`), without ids and texts. Intervals and tests
are recomputed over all cells whenever a job adds one; a pair of methods is compared over the seeds that both have.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from proper.evaluation.comparisons import adjust, comparison_rows, default_pairs
from proper.evaluation.metrics import FloatArray, TaskInfo, get_metric
from proper.evaluation.results import metric_row, plain
from proper.evaluation.statistics import Effort, UserScores

Table = dict[str, Any]
Cells = Mapping[str, Mapping[str, Mapping[str, Any]]]
"""Cells by method, then by seed."""
EFFORT = Effort()


def cell_of(scores: Mapping[str, UserScores], **measured: Any) -> dict[str, Any]:
    """Return the cell of one method and seed from its scores by metric; `measured` says how it was measured."""
    return {**measured, "sums": {name: _packed(one.sums[0]) for name, one in scores.items()}}


def merged(table: Table | None, new: Table, pairs: Sequence[tuple[str, str]] = ()) -> Table:
    """Return a table with the cells of `new` added to or in place of those of `table`, and its figures.

    Args:
        table: the committed table; None if there is none.
        new: a table with `settings`, `queries`, `counts`, `task`, `cells` and `cost`.
        pairs: (method, against) pairs to compare, beside those of `comparisons.default_pairs`.

    Raises:
        ValueError: the two tables are not of the same queries.
    """
    there: Table = table or {}
    if there and there["queries"] != new["queries"]:
        raise ValueError("the queries of the committed table are others than those of this run")
    methods = [*there.get("cells", {}), *new["cells"]]
    cells = {one: {**there.get("cells", {}).get(one, {}), **new["cells"].get(one, {})} for one in methods}
    cells = {one: dict(sorted(found.items(), key=lambda each: int(each[0]))) for one, found in cells.items()}
    cost = {row["method"]: row for row in (*there.get("cost", ()), *new["cost"])}
    task = TaskInfo(new["task"]["name"], new["task"]["kind"])
    figures = _figures(cells, np.asarray(new["counts"], dtype=np.float64), task, pairs)
    return {**there, **new, **figures, "cost": [cost[one] for one in cells if one in cost], "cells": cells}


def _figures(cells: Cells, counts: FloatArray, task: TaskInfo, more: Sequence[tuple[str, str]]) -> dict[str, Any]:
    """Return the rows of `metrics` and of `comparisons`."""
    metrics = [
        metric_row((method, name), _scores(name, own, counts, sorted(own, key=int)), task, EFFORT)
        for method, own in cells.items()
        for name in _metrics(own)
    ]
    comparisons = []
    for method, against in dict.fromkeys([*default_pairs([*cells]), *more]):
        shared = sorted(set(cells.get(method, {})) & set(cells.get(against, {})), key=int)
        names = [name for name in _metrics(cells[method]) if name in _metrics(cells[against])] if shared else []
        for name in names:
            both = {(one, name): _scores(name, cells[one], counts, shared) for one in (method, against)}
            comparisons += comparison_rows(both, [(method, against)], task, EFFORT)
    adjust(comparisons)
    return dict(plain({"metrics": metrics, "comparisons": comparisons}))


def _metrics(own: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """Return the metrics that all cells of a method have."""
    first, *others = own.values()
    return [name for name in first["sums"] if all(name in other["sums"] for other in others)]


def _scores(name: str, own: Mapping[str, Mapping[str, Any]], counts: FloatArray, seeds: Sequence[str]) -> UserScores:
    """Return a method's scores over some seeds; users have their numbers as ids."""
    sums = np.stack([_unpacked(own[seed]["sums"][name]) for seed in seeds])
    return UserScores(get_metric(name), tuple(f"{user:06}" for user in range(len(counts))), sums, counts)


def _packed(sums: FloatArray) -> dict[str, Any]:
    """Return the sums of one seed `(U, F)` as JSON: a word for each user, "place:value,..." where F > 1."""
    return {"width": sums.shape[1], "users": " ".join(_word(row) for row in sums)}


def _word(row: FloatArray) -> str:
    if len(row) == 1:
        return f"{row[0]:.7g}"
    return ",".join(f"{at}:{row[at]:.7g}" for at in np.flatnonzero(row)) or "-"


def _unpacked(packed: Mapping[str, Any]) -> FloatArray:
    """Return the sums of one seed `(U, F)` from their JSON."""
    words = packed["users"].split(" ")
    sums = np.zeros((len(words), packed["width"]))
    for user, word in enumerate(words):
        if packed["width"] == 1:
            sums[user, 0] = float(word)
        elif word != "-":
            for at, value in (each.split(":") for each in word.split(",")):
                sums[user, int(at)] = float(value)
    return sums
