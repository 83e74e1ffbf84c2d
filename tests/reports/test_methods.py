"""The methods table, the scatter, the claim and the CSV, from plain result files."""

from __future__ import annotations

import csv
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from proper.reports import write_report
from proper.reports.load import load_run
from proper.reports.methods import claim_story, cost_quality, methods_table, write_methods_csv


@pytest.fixture
def many(change: Callable[[Callable[[dict[str, Any]], None]], None], folder: Path) -> Path:
    """The run with a method beside the stages, standings and what could be resolved."""

    def edit(results: dict[str, Any]) -> None:
        for row in results["metrics"]:
            row["standing"] = {"users": "best", "oppu": "tied"}.get(row["method"], "")
            row["by_seed"] = None if row["value"] is None else [row["value"] - 0.01, row["value"] + 0.01]
        first = results["comparisons"][0]
        results["comparisons"].append(
            {**first, "method": "users", "against": "oppu", "difference": 0.05, "relative": 0.08, "ci95": [-0.02, 0.1],
             "p_value": 0.2, "p_adjusted": 0.2, "family": "other", "resolvable": 0.08}
        )  # fmt: skip
        results["cost"].append(
            {"method": "oppu", "parameters_per_user": 5, "bytes_per_user": 0, "truncated_prompts": 7}
        )
        results["personalization"] = {"claimed": False, "beaten": [], "not_beaten": ["users > swapped"], "missing": []}

    change(edit)
    return folder


def test_the_best_is_bold_and_first_and_a_tie_is_marked(many: Path) -> None:
    table = methods_table(load_run(many))
    assert table is not None
    assert [str(line[0]) for line in table.rows] == [
        "<b>Users</b>", "OPPU ≈", "Groups", "Population", "Backbone",
    ]  # fmt: skip
    oppu = table.rows[1]
    assert oppu[4:7] == ["+0.050", "not resolvable here", "Users − OPPU"] and oppu[8] == "7"
    assert table.rows[2][6] == "Groups − Population" and table.rows[2][3] == "0.573 to 0.593"
    page = write_report(many).read_text(encoding="utf-8")
    assert "<b>Users</b>" in page and "not resolvable here" in page and "Cost against quality" in page
    assert (
        "Personalization cannot be claimed. No measurable gain: Users over Another user&#39;s adapter (swapped)."
        in page
    )


def test_stages_alone_have_no_table_of_methods(folder: Path, change: Any) -> None:
    change(lambda results: results.update(metrics=[r for r in results["metrics"] if r["method"] != "oppu"]))
    assert methods_table(load_run(folder)) is None
    assert "All methods on the same queries" not in write_report(folder).read_text(encoding="utf-8")


def test_the_scatter_holds_every_method_of_known_cost(many: Path) -> None:
    figure = cost_quality(load_run(many))
    assert figure is not None and figure.drawing.count('class="mark"') == figure.drawing.count('class="key"') == 3
    assert "Users&#10;accuracy 0.641&#10;bytes per user 24.7 kB" in figure.drawing


def test_the_csv_holds_what_the_table_shows(many: Path) -> None:
    with write_methods_csv(many).open(encoding="utf-8", newline="") as file:
        rows = {(row["method"], row["metric"]): row for row in csv.DictReader(file)}
    users, oppu = rows["users", "accuracy"], rows["oppu", "accuracy"]
    assert (users["value"], users["standing"], users["bytes_per_user"]) == ("0.641", "best", "24690")
    assert (oppu["low"], oppu["against"], oppu["difference"], oppu["resolvable"]) == (
        "",
        "users - oppu",
        "0.05",
        "0.08",
    )
    assert float(oppu["seed_spread"]) == pytest.approx(0.02)
    assert ("users", "loss") not in rows


@pytest.mark.parametrize(
    ("claim", "says"),
    [
        ({"claimed": True}, "Every control is beaten at p < .05"),
        ({"claimed": None, "not_beaten": [], "missing": ["shuffled"]}, "missing: Shuffled user ids"),
        ({"claimed": False, "undertrained": True, "not_beaten": []}, "cannot be claimed: population is no better"),
        ({"claimed": False, "not_beaten": ["groups > population-more"]}, "Groups over Population, more training"),
    ],
)
def test_what_is_said_of_the_claim(claim: dict[str, Any], says: str) -> None:
    assert says in " ".join(claim_story(claim))
    assert claim_story({}) == []
