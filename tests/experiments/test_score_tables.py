"""Tables of cells: what several jobs add one by one gives the figures of one evaluation of everything."""

from __future__ import annotations

import json
import random
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from experiments import jobs, queue
from experiments.questions import shown_pairs
from experiments.score_tables import EFFORT, cell_of, merged
from proper.evaluation.metrics import Prediction, TaskInfo
from proper.evaluation.results import RawResults, build_results
from proper.evaluation.scoring import score_all

if TYPE_CHECKING:
    from tests.experiments.conftest import MakeJob

SETS = {
    "rating": TaskInfo("stars", "rating", ("1", "2", "3")),
    "classification": TaskInfo("sections", "classification", ("a", "b", "c")),
}
METHODS = ("population", "groups", "users", "swapped")


def answers(seed: int, method: str, task: TaskInfo) -> list[Prediction]:
    """Invent answers to the same queries of five users; each method and seed answers otherwise."""
    targets, own = random.Random(0), random.Random(f"{method} {seed}")
    rows = [(f"u{user}", targets.choice(task.labels)) for user in range(5) for _ in range(targets.randint(1, 3))]
    return [
        Prediction(id=at, user=user, prompt="", target=target, prediction=own.choice(task.labels), loss=own.random())
        for at, (user, target) in enumerate(rows)
    ]


def table(task: TaskInfo, method: str, seed: int, queries: str = "same") -> dict[str, Any]:
    scores = score_all({seed: {method: answers(seed, method, task)}}, task)
    cell = cell_of({name: one for (_, name), one in scores.items()}, code="x")
    return {
        **{"queries": queries, "task": {"name": task.name, "kind": task.kind}, "cost": [{"method": method}]},
        **{"cells": {method: {str(seed): cell}}},
        "counts": next(iter(scores.values())).counts.tolist(),
    }


def rows_of(found: dict[str, Any], key: str) -> list[dict[str, Any]]:
    kept = (
        "method",
        "against",
        "metric",
        "value",
        "difference",
        "ci95",
        "p_value",
        "p_adjusted",
        "by_seed",
        "resolvable",
    )
    return sorted(
        ({name: row[name] for name in kept if name in row} for row in found[key]), key=lambda row: json.dumps(row)[:90]
    )


@pytest.mark.parametrize("kind", SETS)
@given(order=st.permutations([(method, seed) for method in METHODS for seed in (0, 1)]))
@settings(max_examples=3, deadline=None)
def test_cells_added_in_any_order_give_the_figures_of_one_evaluation(kind: str, order: list[tuple[str, int]]) -> None:
    task = SETS[kind]
    found: dict[str, Any] | None = None
    for method, seed in order:
        found = json.loads(json.dumps(merged(found, table(task, method, seed))))
    assert found is not None
    predictions = {seed: {method: answers(seed, method, task) for method in METHODS} for seed in (0, 1)}
    whole = build_results(RawResults(predictions=predictions, task=task, run={}, seconds={}), EFFORT)
    for key in ("metrics", "comparisons"):
        ours, theirs = rows_of(found, key), rows_of(whole, key)
        assert len(ours) == len(theirs)
        for one, other in zip(ours, theirs, strict=True):
            assert one == {
                name: pytest.approx(value, abs=1e-5) if not isinstance(value, str) else value
                for name, value in other.items()
            }


def test_a_pair_is_compared_over_the_seeds_that_both_have() -> None:
    task, found = SETS["rating"], None
    for method, seed in (("users", 0), ("users", 1), ("swapped", 1)):
        found = merged(found, table(task, method, seed))
    alone = merged(table(task, "users", 1), table(task, "swapped", 1))
    assert found is not None
    assert rows_of(found, "comparisons") == rows_of(alone, "comparisons")
    assert {(row["method"], row["seeds"]) for row in found["metrics"]} == {("users", 2), ("swapped", 1)}
    assert [row["method"] for row in found["cost"]] == ["users", "swapped"]
    with pytest.raises(ValueError, match="the queries of the committed table are others"):
        merged(found, table(task, "users", 2, queries="other"))


def test_a_job_runs_the_cells_that_its_table_lacks(
    make_job: MakeJob, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = (
        {"user_id": user, "timestamp": at, "input": f"{at}:", "output": user[: at % 3 + 1]}
        for user in ("ann", "bob", "eve")
        for at in range(12)
    )
    job = make_job(rows, {}, name="one", table="whole", seeds=(0,), methods=("population",), stages=("population",))
    log = tmp_path / "runs" / "one.log"
    queue.run_job(job)
    assert jobs.state(job, {}) == "done" and log.read_text(encoding="utf-8").count("read interactions") == 1
    both = replace(job, seeds=(0, 1))
    assert jobs.state(both, {}) == "stale"
    queue.run_job(both)
    found = json.loads((tmp_path / "results" / "whole.json").read_text(encoding="utf-8"))
    assert jobs.state(both, {}) == "done" and log.read_text(encoding="utf-8").count("read interactions") == 2
    seeds = {row["method"]: row["seeds"] for row in found["metrics"] if row["primary"]}
    assert seeds["population"] == 2 and seeds["user-majority"] == 2
    text = json.dumps({**found, "config": "", "settings": "", "run": {**found["run"], "backbone": ""}})
    assert str(tmp_path) not in text and '"ann"' not in text
    # The prompts of a method that retrieves are others, the queries are the same.
    queue.run_job(replace(job, name="two", methods=("rag",)))
    found = json.loads((tmp_path / "results" / "whole.json").read_text(encoding="utf-8"))
    assert {"population", "rag"} <= set(found["cells"])
    # Of other code, cells are run again, unless they are to be kept; of other settings, the table begins anew.
    monkeypatch.setattr(jobs, "cell_key", lambda: "other code")
    assert jobs.state(both, {}) == "stale" and jobs.state(both, {}, keep=True) == "done"
    changed = replace(job, changes=("population.rank=2",))
    assert jobs.lacking(changed, found, keep=True) == {0: ["population"]}


def test_committed_tables_have_every_comparison_that_the_page_shows() -> None:
    for path in sorted(jobs.RESULTS.glob("*.json")):
        found = json.loads(path.read_text(encoding="utf-8"))
        cells = found.get("cells", {})
        there = {frozenset((row["method"], row["against"])) for row in found["comparisons"]}
        for pair in shown_pairs(f"findings/{path.name}"):
            if set(cells.get(pair[0], ())) & set(cells.get(pair[1], ())):
                assert frozenset(pair) in there, (path.name, pair)
