"""What the truth allows, on data small enough to work out by hand."""

from __future__ import annotations

from dataclasses import replace

import pytest

from proper.errors import DataError
from proper.evaluation.metrics import TaskInfo
from proper.evaluation.truth import TruthShares, fits, read_truth, truth_of_data, truth_section
from proper.files import write_json

TASK = TaskInfo("demo", "classification", ("a", "b"))
STARS = TaskInfo("demo", "rating", ("1", "5"))


def truth_of(rows: list[tuple[str, str, str]], metric: str = "accuracy") -> TruthShares:
    answers = {f"i{k}": dict(zip(("population", "groups", "users"), row, strict=True)) for k, row in enumerate(rows)}
    return TruthShares(metric, {"u": 0, "v": 1}, 2, answers)


def queries(make, target: str, predictions: str):
    rows = make([("u", target, prediction) for prediction in predictions])
    return [replace(row, item=f"i{row.id}") for row in rows]


def test_shares_worked_out_by_hand(make):
    truth = truth_of([("a", "a", "a"), ("b", "a", "a"), ("b", "a", "a"), ("b", "b", "a")])
    methods = {
        "population": queries(make, "a", "abbb"),  # .25
        "groups": queries(make, "a", "aabb"),  # .5
        "users": queries(make, "a", "aaab"),  # .75
    }
    found = truth_section(truth, {0: methods}, TASK, nmi=0.9)
    assert found["allowed"] == {"population": 0.25, "groups": 0.75, "users": 1.0}
    assert found["measured"] == {"population": 0.25, "groups": 0.5, "users": 0.75}
    assert found["won"] == {"groups": 0.5, "users": 1.0}
    assert (found["nmi"], found["metric"]) == (0.9, "accuracy")


def test_an_error_that_falls_is_a_share_won(make):
    truth = truth_of([("5", "1", "1"), ("5", "5", "1")], "mae")
    methods = {"population": queries(make, "1", "55"), "groups": queries(make, "1", "53")}
    found = truth_section(truth, {0: methods}, STARS)
    assert found["allowed"] == {"population": 4, "groups": 2, "users": 0}
    assert found["won"] == {"groups": 0.5, "users": None}  # stage 3 was not run


def test_seeds_are_averaged_and_nothing_to_win_is_no_share(make):
    truth = truth_of([("a", "a", "a"), ("b", "b", "a")])
    seeds = {
        seed: {level: queries(make, "a", text) for level in ("population", "groups", "users")}
        for seed, text in ((0, "ab"), (1, "aa"))
    }
    found = truth_section(truth, seeds, TASK)
    assert found["measured"]["users"] == 0.75
    assert found["won"] == {"groups": None, "users": 0.0}


def test_a_query_outside_the_truth_is_an_error(make):
    truth = truth_of([("a", "a", "a")])
    with pytest.raises(DataError, match="query 0 of user u: item None has no population answer"):
        truth_section(truth, {0: {"groups": make([("u", "a", "a")])}}, TASK)
    with pytest.raises(DataError, match="query 1 of user u: item i1"):
        truth_section(truth, {0: {"groups": queries(make, "a", "ab")}}, TASK)
    with pytest.raises(DataError, match="no predictions"):
        truth_section(truth, {0: {"groups": []}}, TASK)


def test_a_truth_file_is_read_back(tmp_path):
    answers = {"i0": {"population": "a", "groups": "b", "users": "b"}}
    whole = {"task": "classification", "metric": "accuracy", "groups": {"u": 0}, "n_groups": 1, "answers": answers}
    write_json(tmp_path / "truth.json", whole)
    assert read_truth(tmp_path / "truth.json") == TruthShares("accuracy", {"u": 0}, 1, answers)
    with pytest.raises(DataError, match="nowhere.json: no such file"):
        read_truth(tmp_path / "nowhere.json")
    for key in ("metric", "groups", "n_groups", "answers"):
        write_json(tmp_path / "truth.json", {other: value for other, value in whole.items() if other != key})
        with pytest.raises(DataError, match=f"truth.json: {key}: is missing"):
            read_truth(tmp_path / "truth.json")
    write_json(tmp_path / "truth.json", {**whole, "metric": "bleu"})
    with pytest.raises(DataError, match="'bleu' is not known"):
        read_truth(tmp_path / "truth.json")


def test_a_file_of_another_program_is_not_the_truth(tmp_path, caplog):
    own, data = tmp_path / "run" / "data" / "truth.json", tmp_path / "rows.jsonl"
    assert truth_of_data(data, own) is None
    (tmp_path / "truth.json").write_text("[1, 2]")
    assert truth_of_data(data, own) is None
    assert caplog.messages == [f"{tmp_path / 'truth.json'}: metric: is missing or is no str; the file is not used"]
    with pytest.raises(DataError, match="metric: is missing"):
        truth_of_data(data, tmp_path / "truth.json")


def test_a_truth_of_other_rows_or_another_kind_of_task_does_not_fit(make):
    truth, rows = truth_of([("a", "a", "a"), ("b", "b", "a")]), queries(make, "a", "ab")
    assert fits(truth, rows, TASK)
    assert not fits(truth, rows, TaskInfo("free", "generation"))
    assert not fits(truth, [replace(rows[0], item="new"), rows[1]], TASK)
