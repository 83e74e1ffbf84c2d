"""The results file: its shape, its families, its signs, and what it refuses."""

from __future__ import annotations

import json
import math
import random
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from proper.errors import DataError
from proper.evaluation.comparisons import default_pairs
from proper.evaluation.metrics import Prediction, TaskInfo, score
from proper.evaluation.results import RawResults, build_results, gains_by_user, plain, require_same_queries
from proper.evaluation.statistics import Effort, holm

LABELS = TaskInfo("demo", "classification", ("a", "b", "c"))
STARS = TaskInfo("stars", "rating", ("1", "2", "3", "4", "5"))
RIGHT = {"population": 0.3, "groups": 0.6, "users": 0.9}


def invent(task: TaskInfo, right: float, seed: int, loss: float | None = None) -> list[Prediction]:
    """Invent 20 users with 5 queries each; the more `right`, the more hits."""
    truth, noise = random.Random(0), random.Random(f"{right} {seed}")
    rows = []
    for id_ in range(100):
        target = truth.choice(task.labels)
        answer = target if noise.random() < right else noise.choice(task.labels)
        user = id_ % 20
        rows.append(
            Prediction(
                id=id_, user=f"u{user:02d}", prompt="", target=target, prediction=answer, loss=loss,
                tier="users" if user else "groups", history=5 + user,
            )
        )  # fmt: skip
    return rows


def predictions_of(task: TaskInfo, seeds: int = 2, **more: float) -> dict[int, dict[str, list[Prediction]]]:
    return {
        seed: {method: invent(task, right, seed, loss=2 - right) for method, right in {**RIGHT, **more}.items()}
        for seed in range(seeds)
    }


def build(task: TaskInfo = LABELS, predictions: Any = None, **more: Any) -> dict[str, Any]:
    found = RawResults(
        predictions=predictions or predictions_of(task),
        task=task,
        run={"backbone": "tiny", "versions": {}, "data_sha256": "0", "device": "cpu"},
        seconds={"population": 1.5},
        **more,
    )
    return build_results(found, Effort(200, 500))


@pytest.mark.parametrize("task", [LABELS, STARS])
def test_the_file_has_exactly_the_keys_of_the_interface(task):
    routing = {"experts": 2, "utilization": [0.5, 0.5], "entropy": 0.3, "constraint_cosine": np.float64("nan")}
    found = build(task, routing=routing, cost=[{"method": "users", "bytes_per_user": np.int64(3)}], truth={"nmi": 1.0})
    assert set(found) == {
        "schema", "run", "task", "metrics", "comparisons", "cost", "routing", "slices", "signatures", "truth",
    }  # fmt: skip
    assert found["run"] == {
        "backbone": "tiny", "versions": {}, "data_sha256": "0", "device": "cpu", "seeds": [0, 1],
        "seconds": {"population": 1.5},
    }  # fmt: skip
    assert found["task"]["history"] == {"min": 5, "median": 14.5, "max": 24}
    assert (found["task"]["target_users"], found["task"]["queries"], found["task"]["kind"]) == (20, 100, task.kind)
    assert set(found["metrics"][0]) >= {
        "task", "method", "metric", "value", "value_users", "ci95", "users", "queries", "seeds", "higher_is_better",
        "primary",
    }  # fmt: skip
    assert set(found["comparisons"][0]) >= {
        "task", "method", "against", "metric", "difference", "relative", "ci95", "p_value", "p_adjusted", "family",
        "test", "primary",
    }  # fmt: skip
    assert set(found["slices"][0]) >= {"slice", "method", "metric", "value", "ci95", "users"}
    assert found["routing"]["constraint_cosine"] is None and found["cost"][0]["bytes_per_user"] == 3
    assert json.loads(json.dumps(found, allow_nan=False)) == found


def test_values_are_the_metrics_averaged_over_seeds():
    predictions = predictions_of(LABELS)
    rows = {(row["method"], row["metric"]): row for row in build(predictions=predictions)["metrics"]}
    assert list(rows) == [(method, metric) for method in RIGHT for metric in ("accuracy", "f1_macro", "loss")]
    for (method, metric), row in rows.items():
        by_seed = [score(metric, predictions[seed][method], LABELS) for seed in (0, 1)]
        assert row["by_seed"] == pytest.approx(by_seed)
        assert row["value"] == pytest.approx(np.mean(by_seed))
        assert (row["seeds"], row["users"], row["queries"]) == (2, 20, 100)
        assert row["primary"] == (metric == "accuracy") and row["higher_is_better"] == (metric != "loss")
        assert row["ci95"][0] <= row["ci95"][1]


def test_a_method_with_a_missing_loss_has_no_loss_row():
    predictions = predictions_of(LABELS)
    predictions[1]["groups"][3] = replace(predictions[1]["groups"][3], loss=None)
    predictions[0]["users"][3] = replace(predictions[0]["users"][3], loss=math.nan)
    found = build(predictions=predictions)
    assert {row["method"] for row in found["metrics"] if row["metric"] == "loss"} == {"population"}
    assert not [row for row in found["comparisons"] if row["metric"] == "loss"]


@pytest.mark.parametrize("task", [LABELS, STARS])
def test_the_primary_family_is_the_steps_between_stages_and_each_family_is_adjusted_by_itself(task):
    found = build(task, predictions_of(task, rag=0.4))["comparisons"]
    main = "accuracy" if task is LABELS else "mae"
    steps = [row for row in found if row["family"] == "primary"]
    assert [(row["method"], row["against"], row["metric"]) for row in steps] == [
        ("groups", "population", main),
        ("users", "groups", main),
    ]
    assert all(row["primary"] == (row["metric"] == main) for row in found)
    for family in ("primary", "other"):
        rows = [row for row in found if row["family"] == family]
        assert [row["p_adjusted"] for row in rows] == holm([row["p_value"] for row in rows])
    assert all(row["relative"] > 0 for row in steps)
    assert (steps[0]["difference"] > 0) == (task is LABELS)
    assert ("users", "rag", main) in [(row["method"], row["against"], row["metric"]) for row in found]


def test_which_pairs_are_compared():
    assert default_pairs(["population", "groups", "users"]) == [
        ("groups", "population"), ("users", "groups"), ("users", "population"),
    ]  # fmt: skip
    assert default_pairs(["base", "population", "groups"]) == [("groups", "population"), ("groups", "base")]
    assert default_pairs(["rag", "oppu"]) == []
    assert default_pairs(["base", "prior"]) == [("base", "prior")], "what is said of them needs a test"
    assert ("population", "lead") in default_pairs(["population", "groups", "lead"]), "text has no best constant"
    asked = build(pairs=[("groups", "population"), ("population", "users")])["comparisons"]
    assert [(row["method"], row["against"]) for row in asked if row["primary"]] == [
        ("groups", "population"), ("users", "groups"), ("users", "population"), ("population", "users"),
    ]  # fmt: skip


def test_signatures_are_said():
    same = {0: {"population": invent(LABELS, 0.5, 0), "groups": invent(LABELS, 0.5, 0)}}
    assert any("No gain from groups" in text for text in build(predictions=same)["signatures"])
    losses = {f"u{user:02d}": 0.1 for user in range(20)}
    assert any("overfits" in text for text in build(history_losses=losses)["signatures"])
    assert not any("overfits" in text for text in build()["signatures"])


@pytest.mark.parametrize("task", [LABELS, STARS])
def test_gains_by_user_against_scoring_each_user(task):
    predictions = predictions_of(task)
    found = gains_by_user(predictions, task)
    metric, sign = ("accuracy", 1) if task is LABELS else ("mae", -1)
    assert (found["metric"], found["higher_is_better"]) == (metric, sign == 1)
    assert [row["history"] for row in found["users"]] == list(range(5, 25))
    for row in found["users"]:
        own = {
            method: np.mean(
                [
                    score(metric, [p for p in seed[method] if p.user == row["user"]], task)
                    for seed in predictions.values()
                ]
            )
            for method in RIGHT
        }
        assert row["values"] == pytest.approx(own)
        assert row["gain_groups"] == pytest.approx(sign * (own["groups"] - own["population"]))
        assert row["gain_users"] == pytest.approx(sign * (own["users"] - own["groups"]))
        assert row["tier"] == ("groups" if row["user"] == "u00" else "users") and row["queries"] == 5


def test_gains_without_a_stage_are_none():
    predictions = {0: {"base": invent(LABELS, 0.1, 0), "groups": invent(LABELS, 0.5, 0)}}
    row = gains_by_user(predictions, LABELS)["users"][0]
    assert row["gain_groups"] is None and row["gain_users"] is None
    constant = [replace(row, tier="trivial") for row in predictions[0]["base"]]
    rows = gains_by_user({0: {"prior": constant, **predictions[0]}}, LABELS)["users"]
    assert {row["tier"] for row in rows} == {"groups", "users"}, "the last stage's, whichever method comes first"


def test_the_order_of_predictions_changes_nothing():
    predictions = predictions_of(STARS)
    wanted = build(STARS, predictions)
    for methods in predictions.values():
        for rows in methods.values():
            random.Random(1).shuffle(rows)
    assert build(STARS, predictions) == wanted


@pytest.mark.parametrize(
    ("spoil", "says"),
    [
        (lambda p: p[1]["groups"].pop(), "predictions of groups .seed 1.: 1 queries are not answered"),
        (lambda p: p[1].pop("users"), "predictions of seed 1 are of population, groups, not of"),
        (lambda p: p[0]["users"].append(p[0]["users"][0]), "predictions of users .seed 0.: query 0 is answered twice"),
        (
            lambda p: p[0]["users"].__setitem__(7, replace(p[0]["users"][7], user="u19")),
            "users .seed 0.: query 7 has another user or gold",
        ),
        (
            lambda p: p[0]["users"].__setitem__(7, replace(p[0]["users"][7], target="zzz")),
            "users .seed 0.: query 7 has another user or gold",
        ),
        (lambda p: p.clear(), "no predictions to evaluate"),
        (lambda p: p[0]["population"].clear(), "no predictions to evaluate"),
    ],
)
def test_methods_that_answered_something_else_are_refused(spoil, says):
    predictions = predictions_of(LABELS)
    spoil(predictions)
    with pytest.raises(DataError, match=says):
        require_same_queries(predictions)


def test_plain_values():
    value = {"a": (np.float32(0.5), math.inf), 1: np.asarray([1.0, math.nan]), "b": [np.bool_(True), None, "x", 2]}
    assert plain(value) == {"a": [0.5, None], "1": [1.0, None], "b": [True, None, "x", 2]}


def test_a_small_file_is_what_it_always_was():
    """Against `results_before.json`: every key, in order, every number. Rewritten when intervals took in the seeds."""

    def same(found: Any, before: Any) -> bool:
        if isinstance(before, dict):
            keys = [key for key in found if key != "trivial"]  # Rows of metrics say since then whether they are.
            return keys == list(before) and all(same(found[key], before[key]) for key in before)
        if isinstance(before, list):
            return len(found) == len(before) and all(map(same, found, before))
        return found == (pytest.approx(before, rel=1e-9) if isinstance(before, float) else before)

    predictions = {
        seed: {method: few(right, seed) for method, right in (("population", 0.3), ("groups", 0.6), ("swapped", 0.2))}
        for seed in (0, 1)
    }
    evidence = RawResults(
        predictions=predictions,
        task=STARS,
        run={"backbone": "tiny"},
        seconds={"population": 1.5},
        cost=[{"method": "groups", "bytes_per_user": 3}],
        routing={"experts": 2, "entropy": 0.3},
        truth={"nmi": 1.0},
        history_losses={"u1": 0.1},
        pairs=[("population", "swapped")],
        user_slices={"new": {"u1", "u2"}},
        query_slices={"seen": set(range(0, 24, 2)), "none": set()},
    )
    before = json.loads(Path(__file__).with_name("results_before.json").read_text(encoding="utf-8"))
    assert same(build_results(evidence, Effort(50, 100)), before)


def few(right: float, seed: int) -> list[Prediction]:
    """Invent 6 users with 4 queries each."""
    truth, noise = random.Random(0), random.Random(f"{right} {seed}")
    rows = []
    for id_ in range(24):
        target = truth.choice(STARS.labels)
        answer = target if noise.random() < right else noise.choice(STARS.labels)
        user = id_ % 6
        rows.append(
            Prediction(
                id=id_, user=f"u{user}", prompt="", target=target, prediction=answer, loss=2 - right,
                tier="users" if user else "groups", history=5 + 3 * user,
            )
        )  # fmt: skip
    return rows
