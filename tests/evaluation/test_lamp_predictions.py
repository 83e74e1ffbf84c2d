"""Prediction files that the benchmark's own scorer takes; what it checks is written out here."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from rouge_score import rouge_scorer, scoring
from sklearn.metrics import f1_score

from proper.config import DataConfig
from proper.config.lamp_tasks import LAMP_TASKS
from proper.evaluation.lamp_predictions import (
    GOLDS,
    SCORES,
    official_output,
    official_scores,
    write_lamp_predictions,
)
from proper.evaluation.metrics import TaskInfo, score


def official_pairs(golds: Path, predictions: Path, task: str) -> list[tuple[str, str]]:
    """What the official script does before it counts: task and ids must agree, then (prediction, gold) by id."""
    gold, found = (json.loads(path.read_text(encoding="utf-8")) for path in (golds, predictions))
    assert gold["task"] == found["task"] == task
    by_id = [{row["id"]: row["output"] for row in file["golds"]} for file in (gold, found)]
    assert set(by_id[0]) == set(by_id[1])
    return [(by_id[1][identity], by_id[0][identity]) for identity in by_id[0]]


def data(task: str, form: str = "lamp") -> DataConfig:
    return DataConfig(path="x", format=form, task=task)  # type: ignore[arg-type]


def task(name: str) -> TaskInfo:
    return TaskInfo(name, LAMP_TASKS[name].kind, LAMP_TASKS[name].labels, official=True)


def test_the_official_script_counts_what_we_count(tmp_path: Path, make: Any) -> None:
    rows = [
        replace(row, item=f"3{row.id}")
        for row in make([("a", "4", "5"), ("a", "1", " 1 "), ("b", "3", "none"), ("b", "2", "4.5")])
    ]
    write_lamp_predictions(tmp_path, {"users": rows}, data("lamp-3"), task("lamp-3"))
    pairs = official_pairs(tmp_path / GOLDS, tmp_path / "users.lamp.json", "LaMP_3")
    numbers = [(5.0 if found == "none" else float(found), float(gold)) for found, gold in pairs]
    mae = sum(abs(found - gold) for found, gold in numbers) / len(numbers)
    assert mae == score("mae", rows, task("lamp-3"))
    assert json.loads((tmp_path / SCORES).read_text()) == {
        "task": "LaMP_3",
        "scores": {"users": {"MAE": mae, "RMSE": score("rmse", rows, task("lamp-3"))}},
    }
    assert json.loads((tmp_path / "users.lamp.json").read_text())["golds"][1] == {"id": "31", "output": "1"}


@pytest.mark.parametrize(
    ("name", "form", "official"),
    [
        ("lamp-2m", "lamp", "LaMP_2"),
        ("lamp-2n", "lamp", "LaMP_2"),
        ("lamp-2m", "oppu", "LaMP_2M"),
        ("lamp-2n", "oppu", "LaMP_2N"),
        ("lamp-7", "oppu", "LaMP_7"),
    ],
)
def test_the_task_has_the_name_of_the_golds(tmp_path: Path, make: Any, name: str, form: str, official: str) -> None:
    write_lamp_predictions(tmp_path, {"base": make([("a", "x", "y")])}, data(name, form), task(name))
    assert json.loads((tmp_path / "base.lamp.json").read_text())["task"] == official


def test_ids_that_users_share_are_told_apart(tmp_path: Path, make: Any) -> None:
    rows = [replace(row, item="0") for row in make([("a", "x", "y"), ("b", "z", "z")])]
    write_lamp_predictions(tmp_path, {"base": rows}, data("lamp-4", "oppu"), task("lamp-4"))
    assert official_pairs(tmp_path / GOLDS, tmp_path / "base.lamp.json", "LaMP_4") == [("y", "x"), ("z", "z")]
    assert json.loads((tmp_path / GOLDS).read_text())["golds"][1] == {"id": "b/0", "output": "z"}


def test_a_citation_gets_the_bracket_that_the_prompt_had() -> None:
    assert [official_output("lamp-1", text) for text in ("1]", " 2]\n", "[1]", "1", "3]")] == [
        *("[1]", "[2]", "[1]", "1", "3]")
    ]
    assert official_output("lamp-4", "1]") == "1]"


def test_other_data_has_no_such_file(tmp_path: Path, make: Any) -> None:
    rows = {"base": make([("a", "x", "y")])}
    write_lamp_predictions(tmp_path, rows, DataConfig(path="x.jsonl"), TaskInfo("x", "generation"))
    assert not list(tmp_path.iterdir())


def test_macro_f1_runs_over_the_fifteen_labels_of_the_list(make: Any) -> None:
    pairs = [("comedy", " comedy\n"), ("action", "Action"), ("classic", "dystopia"), ("classic", "classic")]
    rows, labels = make([("a", gold, answer) for gold, answer in pairs]), list(LAMP_TASKS["lamp-2m"].labels)
    places = [
        [labels.index(t.strip()) if t.strip() in labels else -1 for t in side] for side in zip(*pairs, strict=True)
    ]
    wanted = f1_score(*places, labels=range(15), average="macro", zero_division=0)
    assert official_scores(rows, task("lamp-2m")) == {"accuracy": 0.5, "f1": pytest.approx(wanted, abs=1e-12)}
    # comedy 1, classic 2/3, and thirteen labels at 0.
    assert wanted == pytest.approx((1 + 2 / 3) / 15)


def test_a_citation_without_its_bracket_is_wrong_and_an_unreadable_score_is_far(make: Any) -> None:
    cited = make([("a", "[1]", "[1]"), ("a", "[2]", "2]"), ("b", "[2]", "[2] ")])
    assert official_scores(cited, task("lamp-1"))["accuracy"] == pytest.approx(2 / 3)
    rated = make([("a", "3", "good"), ("a", "4", ""), ("b", "2", "5 stars"), ("b", "5", " 4.0 ")])
    # Gold 3 -> 5, gold 4 -> 1, gold 2 -> 5.
    assert official_scores(rated, task("lamp-3")) == {"MAE": 9 / 4, "RMSE": pytest.approx((23 / 4) ** 0.5)}


def test_rouge_is_the_script_s_midpoint_over_whole_headlines(make: Any) -> None:
    pairs = [("Today: trams run", "Today"), ("Apples: a quiet year", "a quiet year for apples"), ("Rain", "Sun")]
    rows = make([("a", gold, answer) for gold, answer in pairs])
    scorer, aggregator = rouge_scorer.RougeScorer(["rouge1", "rougeL"]), scoring.BootstrapAggregator()
    for gold, answer in pairs:
        aggregator.add_scores({"rouge1": scorer.score(gold, answer)["rouge1"]})
    np.random.seed(0)
    wanted = aggregator.aggregate()["rouge1"].mid.fmeasure
    assert official_scores(rows, task("lamp-4"))["rouge-1"] == pytest.approx(wanted, abs=1e-12)
    # One word of three, and all four in five; a gold cut at ": " would make the first a full hit.
    assert score("rouge1", rows, task("lamp-4")) == pytest.approx((0.5 + 8 / 9 + 0) / 3, abs=1e-9)
