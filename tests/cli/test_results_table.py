"""The outcome of a run in a few lines."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from proper.cli.results_table import print_results, results_table
from proper.files import write_json


def metric(method: str, value: float, **more: Any) -> dict[str, Any]:
    common = {
        "task": "classification",
        "metric": "accuracy",
        "value_users": value,
        "ci95": [value - 0.05, value + 0.05],
    }
    counts = {"users": 100, "queries": 1234, "seeds": 1, "higher_is_better": True, "primary": True}
    return {**common, **counts, "method": method, "value": value, **more}


def step(method: str, against: str, **more: Any) -> dict[str, Any]:
    common = {"task": "classification", "metric": "accuracy", "difference": 0.1, "relative": 0.2, "ci95": [0.05, 0.15]}
    return {
        **common,
        "method": method,
        "against": against,
        "p_value": 0.01,
        "p_adjusted": 0.02,
        "family": "primary",
        "primary": True,
        **more,
    }


def test_each_method_has_a_line_and_each_step_its_gain() -> None:
    results = {
        "metrics": [
            metric("population", 0.5),
            metric("population", 0.4, metric="f1_macro", primary=False),
            metric("groups", 0.6),
        ],
        "comparisons": [step("groups", "population")],
    }
    assert results_table(results) == [
        "classification: accuracy, higher is better; 100 users, 1234 queries",
        "  population  0.5000 [0.4500, 0.5500]",
        "  groups      0.6000 [0.5500, 0.6500]   +0.1000 [0.0500, 0.1500] against population, 20.0 % better, p = .020",
    ]


@pytest.mark.parametrize(
    ("more", "end"),
    [
        ({"p_adjusted": 0.00002}, "20.0 % better, p < .001"),
        ({"p_adjusted": None}, "20.0 % better, p = .010"),
        ({"p_adjusted": 1.0}, "20.0 % better, p = 1.000"),
        ({"p_adjusted": None, "p_value": None}, "20.0 % better"),
        ({"relative": -0.034}, "3.4 % worse, p = .020"),
        ({"relative": None}, "against population, p = .020"),
    ],
)
def test_chance_and_gain_are_said_in_short(more: dict[str, Any], end: str) -> None:
    results = {
        "metrics": [metric("population", 0.5), metric("groups", 0.6)],
        "comparisons": [step("groups", "population", **more)],
    }
    assert results_table(results)[-1].endswith(end)


def test_errors_are_better_when_lower_and_seeds_are_counted() -> None:
    row = metric("users", 0.7, task="rating", metric="mae", higher_is_better=False, seeds=[0, 1, 2], ci95=None)
    assert results_table({"metrics": [row], "comparisons": []}) == [
        "rating: mae, lower is better; 100 users, 1234 queries, 3 seeds",
        "  users  0.7000",
    ]


def test_a_run_prints_its_stages_and_where_its_report_is(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    print_results(tmp_path)
    assert capsys.readouterr().out == f"{tmp_path}\n"
    write_json(tmp_path / "results.json", {"metrics": [metric("population", 0.5)], "comparisons": []})
    (tmp_path / "report.html").write_text("<html></html>")
    print_results(tmp_path)
    assert capsys.readouterr().out.splitlines()[1:] == [
        "  population  0.5000 [0.4500, 0.5500]",
        f"{tmp_path}/report.html",
    ]


def test_rows_without_a_model_are_marked_and_have_the_last_word() -> None:
    results = {
        "metrics": [metric("users", 0.5), metric("prior", 0.6, trivial=True, standing="best")],
        "trivial": {"sentences": ["Trivial rows, without a model, are better than users."]},
    }
    assert results_table(results)[2:] == [
        "  prior  0.6000 [0.5500, 0.6500]   trivial   best",
        "Trivial rows, without a model, are better than users.",
    ]


def test_one_user_has_no_interval() -> None:
    none = [None, None]
    results = {
        "metrics": [metric("population", 0.5, ci95=none), metric("groups", 0.6, ci95=none)],
        "comparisons": [step("groups", "population", ci95=none, p_adjusted=1.0)],
    }
    first, second = results_table(results)[1:]
    assert first == "  population  0.5000"
    assert second == "  groups      0.6000   +0.1000 against population, 20.0 % better, p = 1.000"


def test_trivial_rows_that_are_not_beaten_are_said_below_their_task() -> None:
    tasks = [{"name": name, "trivial": {"sentences": [f"{name} is beaten."]}} for name in ("one", "two")]
    metrics = [metric("users", 0.5, task=name) for name in ("one", "two")]
    lines = results_table({"metrics": metrics, "comparisons": [], "tasks": tasks})
    assert [lines[2], lines[5]] == ["one is beaten.", "two is beaten."] and len(lines) == 6
