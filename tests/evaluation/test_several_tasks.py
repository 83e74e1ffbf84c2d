"""Joining the results of tasks: one task stays as it is; of several, every row says which it is of."""

from __future__ import annotations

from typing import Any

from proper.evaluation.several_tasks import joined_gains, joined_results


def part(name: str, value: float) -> dict[str, Any]:
    return {
        "task": {"name": name, "kind": "classification"},
        "metrics": [{"task": name, "value": value}],
        "comparisons": [{"task": name, "difference": value}],
        "slices": [{"slice": "short", "value": value}],
        "signatures": [f"{name} is odd"],
        "personalization": {"level": "none"},
        "routing": {"experts": 2},
    }


def test_one_task_stays_as_it_is() -> None:
    alone = part("", 1.0)
    assert joined_results({"": alone}) is alone and joined_gains({"": alone}) is alone


def test_rows_of_several_tasks_name_their_task() -> None:
    joined = joined_results({"a": part("a", 1.0), "b": part("b", 2.0)})
    assert [row["task"] for row in joined["metrics"]] == [row["task"] for row in joined["comparisons"]] == ["a", "b"]
    assert [(row["task"], row["slice"]) for row in joined["slices"]] == [("a", "short"), ("b", "b: short")]
    assert joined["task"]["name"] == "a" and [row["name"] for row in joined["tasks"]] == ["a", "b"]
    assert joined["signatures"] == ["a: a is odd", "b: b is odd"]
    assert "personalization" not in joined and joined["tasks"][1]["personalization"] == {"level": "none"}
    gains = joined_gains({"a": {"users": [1]}, "b": {"users": [2]}})
    assert gains == {"users": [1], "tasks": {"a": {"users": [1]}, "b": {"users": [2]}}}
