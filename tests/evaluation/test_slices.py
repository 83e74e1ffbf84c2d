"""Slices by history length: who is in, and that a slice's numbers are those of its users alone."""

from __future__ import annotations

import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from proper.evaluation.metrics import TaskInfo
from proper.evaluation.slices import history_slices, slice_rows
from proper.evaluation.statistics import Effort, estimate, user_scores

TASK = TaskInfo("demo", "classification", ("a", "b"))


def test_slices_worked_out_by_hand():
    histories = {f"u{length:03d}": length for length in range(1, 121)}
    slices = history_slices(histories)
    assert [len(slices[f"history-q{part}"]) for part in (1, 2, 3, 4)] == [30, 30, 30, 30]
    assert slices["history-q1"][0] == "u001" and slices["history-q4"][-1] == "u120"
    assert slices["bottom-100"] == [f"u{length:03d}" for length in range(1, 101)]
    assert slices["under-10"] == [f"u{length:03d}" for length in range(1, 10)]


def test_users_with_equally_much_history_stay_together_and_empty_slices_are_left_out():
    slices = history_slices({"a": 12, "b": 12, "c": 12, "d": 40})
    assert slices == {"history-q1": ["a", "b", "c"], "history-q4": ["d"], "bottom-100": ["a", "b", "c", "d"]}
    assert history_slices({"a": 64, "b": 64}) == {"history-q1": ["a", "b"], "bottom-100": ["a", "b"]}
    assert history_slices({}) == {}


@given(st.dictionaries(st.text("abc", min_size=1), st.integers(0, 50), min_size=1))
def test_quartiles_are_everybody_once_in_order(histories):
    slices = history_slices(histories)
    parts = [slices.get(f"history-q{part}", []) for part in (1, 2, 3, 4)]
    assert sorted(user for part in parts for user in part) == sorted(histories)
    lengths = [[histories[user] for user in part] for part in parts if part]
    assert all(max(one) < min(other) for one, other in zip(lengths, lengths[1:], strict=False))


def test_a_row_holds_the_numbers_of_its_users_alone(make):
    random_ = random.Random(0)
    rows = make([(f"u{k % 12:02d}", "a", random_.choice("ab")) for k in range(60)])
    histories = {f"u{k:02d}": k + 4 for k in range(12)}
    scores = {("groups", "accuracy"): user_scores("accuracy", [rows], TASK)}
    found = {row["slice"]: row for row in slice_rows(scores, histories, Effort(200, seed=3))}
    short = found["under-10"]
    alone = estimate(user_scores("accuracy", [[row for row in rows if row.user < "u06"]], TASK), Effort(200, seed=3))
    assert (short["value"], short["ci95"]) == (alone.value, [alone.low, alone.high])
    assert (short["users"], short["queries"], short["history"]) == (6, 30, [4, 9])
    assert found["bottom-100"]["value"] == pytest.approx(sum(row.prediction == "a" for row in rows) / 60)
