"""Numbers as text, and sentences that claim no more than a test shows."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from proper.reports.formats import NO_BREAK, duration, p_text, percent, plain, plural, signed, size, span
from proper.reports.html import gather
from proper.reports.load import ReportedComparison, UserGain, load_run
from proper.reports.narrative import gain_story, headline, outcome

Change = Callable[[Callable[[dict[str, Any]], None]], None]


def compared(difference: float, p: float | None, interval: tuple[float, float] | None = None) -> ReportedComparison:
    return ReportedComparison("t", "users", "groups", "mae", difference, 0.1, interval, p, p, "primary", "", True)


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0.12345, "0.123"),
        (-0.12345, "−0.123"),
        (-0.0001, "0.000"),
        (123.456, "123.5"),
        (12345.6, "12,346"),
        (None, "–"),
    ],
)
def test_plain(value: float | None, text: str) -> None:
    assert plain(value) == text


@given(st.floats(allow_nan=False, allow_infinity=False, min_value=-1e6, max_value=1e6))
def test_signed_keeps_the_value(value: float) -> None:
    text = signed(value)
    read = float(text.replace("−", "-").replace(",", ""))
    assert abs(read - value) <= max(0.00051, abs(value) * 0.006)
    assert text.startswith("+") == (value > 0)


def test_units() -> None:
    assert [size(n) for n in (12, 24690, 5.8e6, 3e12)] == ["12 bytes", "24.7 kB", "5.8 MB", "3 TB"]
    assert [duration(s) for s in (0.0123, 1.84, 600, 9000)] == ["12 ms", "1.84 s", "10 min", "2.5 h"]
    assert [percent(x, sign=True).replace(NO_BREAK, " ") for x in (0.0469, -0.01, 0.0)] == ["+4.7 %", "−1.0 %", "0.0 %"]
    assert [p_text(p).replace(NO_BREAK, " ") for p in (0.0002, 0.012, 1.0)] == ["p < .001", "p = .012", "p = 1"]
    assert span((-0.5, 0.25), sign=True) == "[−0.500, +0.250]"
    assert [plural(n, noun) for n, noun in ((1, "user"), (2, "query"))] == ["1 user", "2 queries"]


@pytest.mark.parametrize(
    ("difference", "p", "interval", "higher", "expected"),
    [
        (-0.1, 0.01, None, False, "gain"),
        (-0.1, 0.01, None, True, "loss"),
        (0.1, 0.05, (0.01, 0.2), True, "none"),
        (0.1, None, (0.01, 0.2), True, "gain"),
        (0.1, None, (-0.01, 0.2), True, "none"),
        (0.1, None, None, True, "none"),
        (0.0, 0.0, None, True, "none"),
    ],
)
def test_only_a_test_makes_a_gain(
    difference: float, p: float | None, interval: tuple[float, float] | None, higher: bool, expected: str
) -> None:
    assert outcome(compared(difference, p, interval), higher) == expected


def test_an_error_that_falls_is_a_gain(render: Callable[[], Any], change: Change) -> None:
    def edit(results: dict[str, Any]) -> None:
        for row in [*results["metrics"], *results["comparisons"]]:
            row["metric"] = "mae" if row["metric"] == "accuracy" else row["metric"]
            row["higher_is_better"] = False
        for row, value in zip(results["metrics"], (0.9, 0.8, 0.7, 0.75), strict=False):
            row["value"] = value
        for row, difference in zip(results["comparisons"], (-0.1, 0.05), strict=True):
            row.update(difference=difference, p_adjusted=0.001)

    change(edit)
    header = render().text["header"]
    assert "Groups: a measurable gain; users: a measurable loss." in header
    assert "Mean absolute error fell from 0.800 to 0.700" in header
    assert "Measurably worse: mean absolute error rose from 0.700 to 0.750" in header


def test_no_gain_anywhere_is_said_plainly(render: Callable[[], Any], change: Change) -> None:
    change(lambda results: [row.update(p_adjusted=0.4) for row in results["comparisons"]] and None)
    assert "No measurable gain at any step." in render().text["header"]


def test_several_tasks_are_told_apart(render: Callable[[], Any], change: Change) -> None:
    def edit(results: dict[str, Any]) -> None:
        for key in ("metrics", "comparisons"):
            results[key] += [{**row, "task": "letters"} for row in results[key]]

        for row in (row for key in ("metrics", "comparisons") for row in results[key] if row["task"] == "letters"):
            row.update(metric={"accuracy": "mae"}.get(row["metric"], row["metric"]), higher_is_better=False)
            row.update(difference=-row.get("difference", 0))
        size = {"kind": "classification", "target_users": 7, "queries": 70}
        results["tasks"] = [{**results["task"]}, {"name": "letters", **size}]

    change(edit)
    page = render()
    assert "Letters, groups: a measurable gain" in page.text["header"] and "notes, users" in page.text["header"]
    assert "notes: Population → Groups" in page.text["header"] and "letters: Population → Groups" in page.text["header"]
    assert "7letters: target users" in page.text["header"] and "letters: queries70" in page.text["run"]
    assert "notes: accuracy" in page.text["stages"] and "letters: mean absolute error" in page.text["stages"]
    assert "notes: Users − Groups" in page.text["scores"] and "letters: Users − Groups" in page.text["scores"]
    said = "methodmain metric", "Accuracy, higher is better; Mean absolute error, lower is better; best first"
    assert all(each in page.text["scores"] for each in said)
    assert "Task notes; users.json has the gains of all." in page.text["gains"]


def users(gain: Callable[[int], float], tier: str = "users") -> list[UserGain]:
    return [UserGain(f"u{n}", n + 1, 50, tier, None, gain(n)) for n in range(40)]


def test_history_is_named_only_where_it_goes_with_the_gain() -> None:
    assert "Users with longer histories had larger gains (rank correlation +1.00)." in gain_story(users(float), "users")
    assert "Users with longer histories had smaller gains (rank correlation −1.00)." in gain_story(
        users(lambda n: -n), "users"
    )
    wave = gain_story(users(lambda n: math.sin(n * 2.4)), "users")
    assert any(line.startswith("The gain does not depend measurably on history length") for line in wave)
    assert gain_story(users(float), "groups") == []


def test_users_without_an_adapter_are_counted() -> None:
    story = gain_story(users(lambda n: 0.0, "groups"), "users")
    assert story[0] == "Of 40 users, 0 gained, 0 lost and 40 stayed the same."
    assert any(line.startswith("40 users are served without an adapter") for line in story)


def trivial(**changes: Any) -> dict[str, Any]:
    found = {"stage": "users", "wins": [], "unclear": [], "beaten": ["prior"], "undertrained": False}
    return {**found, **changes}


@pytest.mark.parametrize(
    ("changes", "begins", "praises"),
    [
        ({}, "Every stage improved on the one before. Users is better than every answer without a model.", True),
        ({"wins": ["prior"]}, "Better than Users (0.641), without a model: User prior (0.700).", False),
        ({"unclear": ["prior"]}, "Users (0.641) is not measurably better than User prior (0.700).", True),
        ({"undertrained": True}, "Population is undertrained: no better than the best constant.", False),
    ],
)
def test_the_headline_speaks_of_rows_without_a_model(
    folder: Path, change: Change, changes: dict[str, Any], begins: str, praises: bool
) -> None:
    def edit(results: dict[str, Any]) -> None:
        for row in results["comparisons"]:
            row.update(p_value=0.01, p_adjusted=0.01, difference=abs(row["difference"]))
        results["metrics"].append({**results["metrics"][0], "method": "prior", "value": 0.7})
        results["trivial"] = trivial(**changes)

    change(edit)
    summary, _ = headline(load_run(folder))
    assert summary.startswith(begins)
    assert ("Every stage improved" in summary) == praises


def test_each_of_several_tasks_is_judged_by_its_own_trivial_rows_and_controls(folder: Path, change: Change) -> None:
    def edit(results: dict[str, Any]) -> None:
        for row in results["comparisons"]:
            row.update(p_value=0.01, p_adjusted=0.01)
        results["comparisons"] += [{**row, "task": "letters"} for row in results["comparisons"]]
        own = [{**row, "task": "letters", "value": 0.3} for row in results["metrics"]]
        results["metrics"] += [*own, {**own[0], "method": "prior", "value": 0.7}]
        lost = {"trivial": trivial(wins=["prior"]), "personalization": {"not_beaten": ["users > swapped"]}}
        results["tasks"] = [{"name": "notes", "trivial": trivial()}, {"name": "letters", **lost}]

    change(edit)
    said, _ = headline(load_run(folder))
    assert said.startswith("letters: Better than Users (0.300), without a model: User prior (0.700). Letters, groups: ")
    assert (
        "notes: Users is better than every answer without a model. letters: No measurable gain over a control" in said
    )
    assert any("letters: Personalization cannot be claimed" in line for line in gather(load_run(folder))["claim"])


def test_the_headline_names_the_controls_that_are_not_beaten(folder: Path, change: Change) -> None:
    lost = ["groups > population-more", "users > swapped"]
    change(lambda results: results.update(personalization={"claimed": False, "not_beaten": lost}))
    said = "Groups over Population, more training; Users over Another user's adapter (swapped)."
    assert headline(load_run(folder))[0].endswith(f"No measurable gain over a control: {said}")
    change(lambda results: results.update(personalization={"claimed": True, "not_beaten": []}))
    assert "control" not in headline(load_run(folder))[0]
