"""Differences of two runs by history length: the ranges, and the values against sums by hand."""

from __future__ import annotations

import pytest

from experiments.histories import differences
from proper.errors import DataError
from proper.evaluation.metrics import Prediction, TaskInfo

TASK = TaskInfo("films", "rating", ("1", "2", "3"))
HISTORIES = {"ann": 5, "bob": 9, "cem": 10, "dan": 200}


def answers(said: dict[str, list[str]]) -> list[Prediction]:
    return [
        Prediction(
            id=at,
            user=user,
            prompt="p",
            target="2",
            prediction=text,
            history=HISTORIES[user],
            label_loss=float(text),
        )
        for user, texts in said.items()
        for at, text in enumerate(texts)
    ]


def test_each_range_has_the_difference_of_its_users() -> None:
    first = answers({"ann": ["1", "2"], "bob": ["2"], "cem": ["3"], "dan": ["1"]})
    second = answers({"ann": ["2", "2"], "bob": ["1"], "cem": ["2"], "dan": ["1"]})
    rows = {tuple(row["history"]): row for row in differences(first, second, TASK, [10, 50]) if row["metric"] == "mae"}
    # By hand, errors of the first and the second: ann 1 and 0 of 2 queries, bob 0 and 1, cem 1 and 0, dan 1 and 1.
    assert {key: (row["users"], row["queries"], row["first"], row["second"]) for key, row in rows.items()} == {
        (0, None): (4, 5, 3 / 5, 2 / 5),
        (0, 10): (2, 3, 1 / 3, 1 / 3),
        (10, 50): (1, 1, 1, 0),
        (50, None): (1, 1, 1, 1),
    }
    assert {row["metric"] for row in differences(first, second, TASK)} == {"mae", "rmse", "label_loss"}
    assert [row["history"] for row in differences(first, second, TASK, []) if row["metric"] == "mae"] == [[0, None]]
    assert rows[0, None]["difference"] == pytest.approx(1 / 5)
    assert rows[0, None]["ci95"][0] <= 1 / 5 <= rows[0, None]["ci95"][1] and 0 < rows[0, None]["p_value"] <= 1


def test_other_queries_are_an_error() -> None:
    with pytest.raises(DataError):
        differences(answers({"ann": ["1"]}), answers({"ann": ["1", "2"]}), TASK)
