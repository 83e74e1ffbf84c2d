"""The experiment on drift: what a policy lives through on a tiny run, and the figures made of it."""

from __future__ import annotations

from pathlib import Path

import pytest

from experiments.drift import POLICIES, Outcome, simulate, summary
from proper.data.demo.changes import LaterItem
from tests.enrolment.conftest import taught
from tests.enrolment.lessons import HABIT, OTHER, lessons
from tests.training.conftest import dataset, encoder, settings

__all__ = ["dataset", "encoder", "settings", "taught"]


def items(periods: int) -> list[LaterItem]:
    """Lessons of "new", whose habits change in the second period."""
    found = []
    for period in range(periods):
        for row in lessons(OTHER if period else HABIT, 20 + 6 * period, 6):
            found.append(LaterItem("new", "abrupt", period, row["prompt"], row["target"]))
    return found


def test_policies_see_each_period_before_they_learn_it(taught: Path, tmp_path: Path) -> None:
    found = {name: simulate(taught, tmp_path / name, POLICIES[name], items(3)) for name in ("never", "always", "drift")}
    assert (found["never"].tried, found["always"].tried) == (0, 3) and found["drift"].tried <= 3
    assert all(len(each.losses["new"]) == 3 for each in found.values())
    first = {name: each.losses["new"][0] for name, each in found.items()}
    assert first["always"] == pytest.approx(first["never"]) == first["drift"]
    assert found["never"].losses["new"][1] > first["never"], "the change of habits is a surprise"
    assert set(found["always"].kept) == {"new"}


def test_figures_are_relative_to_never_and_always() -> None:
    outcomes = {
        "never": Outcome({"a": [1, 3], "b": [1, 1]}, {"a": 1, "b": 1}),
        "always": Outcome({"a": [1, 1], "b": [1, 1]}, {"a": 2, "b": 1}, 4, 2, 8.0),
        "drift": Outcome({"a": [1, 2], "b": [1, 1]}, {"a": 1, "b": 1}, 1, 1, 2.0),
    }
    found = summary(outcomes, {"a": "abrupt", "b": "stable"})["policies"]
    assert [found[name]["gain"] for name in outcomes] == [0, 0.5, 0.25]
    assert found["drift"]["share_of_gain"] == 0.5 and found["drift"]["share_of_seconds"] == 0.25
    assert found["drift"]["share_of_updates"] == 0.25 and found["always"]["kept_loss"] == 1.5
    assert found["drift"]["gain_by_change"] == {"stable": 0, "abrupt": 0.5}
    assert found["always"]["kept_interval"] == [1.0, 2.0]
    assert found["always"]["loss_by_period"] == [1, 1] and found["drift"]["gain_interval"] == [0, 0.5]
