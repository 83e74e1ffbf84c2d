"""When personalization may be claimed."""

from __future__ import annotations

import pytest

from proper.evaluation.controls import CONTROLS, claim


def row(pair, difference=0.1, p=0.01, higher=True, primary=True):
    return {
        "method": pair[0], "against": pair[1], "difference": difference, "p_adjusted": p, "primary": primary,
        "higher_is_better": higher,
    }  # fmt: skip


def test_all_controls_beaten_is_a_claim():
    assert claim([row(pair) for pair in CONTROLS])["claimed"] is True
    assert claim([row(pair, -0.1, higher=False) for pair in CONTROLS])["claimed"] is True


@pytest.mark.parametrize("bad", [{"p": 0.05}, {"difference": -0.1}, {"difference": 0.1, "higher": False}])
@pytest.mark.parametrize("at", range(4))
def test_one_control_not_beaten_is_none(at, bad):
    rows = [row(pair, **(bad if place == at else {})) for place, pair in enumerate(CONTROLS)]
    found = claim(rows)
    assert found["claimed"] is False and found["not_beaten"] == [" > ".join(CONTROLS[at])]


def test_what_was_not_run_is_said():
    found = claim([row(CONTROLS[0])])
    assert found["claimed"] is None and found["missing"] == ["groups-shared-e", "swapped", "shuffled"]
    assert claim([row(("users", "rag")), row(CONTROLS[0], primary=False)]) is None
