"""Prediction files that the benchmark's own scorer takes; what it checks is written out here."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from proper.config import DataConfig
from proper.evaluation.lamp_predictions import GOLDS, official_output, write_lamp_predictions
from proper.evaluation.metrics import TaskInfo, score
from proper.lamp_tasks import LAMP_TASKS


def official_pairs(golds: Path, predictions: Path, task: str) -> list[tuple[str, str]]:
    """What the official script does before it counts: task and ids must agree, then (prediction, gold) by id."""
    gold, found = (json.loads(path.read_text(encoding="utf-8")) for path in (golds, predictions))
    assert gold["task"] == found["task"] == task
    by_id = [{row["id"]: row["output"] for row in file["golds"]} for file in (gold, found)]
    assert set(by_id[0]) == set(by_id[1])
    return [(by_id[1][identity], by_id[0][identity]) for identity in by_id[0]]


def data(task: str, form: str = "lamp") -> DataConfig:
    return DataConfig(path="x", format=form, task=task)  # type: ignore[arg-type]


def test_the_official_script_counts_what_we_count(tmp_path: Path, make: Any) -> None:
    rows = [
        replace(row, item=f"3{row.id}")
        for row in make([("a", "4", "5"), ("a", "1", " 1 "), ("b", "3", "none"), ("b", "2", "4.5")])
    ]
    write_lamp_predictions(tmp_path, "users", rows, data("lamp-3"))
    pairs = official_pairs(tmp_path / GOLDS, tmp_path / "users.lamp.json", "LaMP_3")
    numbers = [(5.0 if found == "none" else float(found), float(gold)) for found, gold in pairs]
    mae = sum(abs(found - gold) for found, gold in numbers) / len(numbers)
    assert mae == score("mae", rows, TaskInfo("lamp-3", "rating", LAMP_TASKS["lamp-3"].labels))
    assert json.loads((tmp_path / "users.lamp.json").read_text())["golds"][1] == {"id": "31", "output": "1"}


@pytest.mark.parametrize(
    ("task", "form", "name"),
    [
        ("lamp-2m", "lamp", "LaMP_2"),
        ("lamp-2n", "lamp", "LaMP_2"),
        ("lamp-2m", "oppu", "LaMP_2M"),
        ("lamp-2n", "oppu", "LaMP_2N"),
        ("lamp-7", "oppu", "LaMP_7"),
    ],
)
def test_the_task_has_the_name_of_the_golds(tmp_path: Path, make: Any, task: str, form: str, name: str) -> None:
    write_lamp_predictions(tmp_path, "base", make([("a", "x", "y")]), data(task, form))
    assert json.loads((tmp_path / "base.lamp.json").read_text())["task"] == name


def test_ids_that_users_share_are_told_apart(tmp_path: Path, make: Any) -> None:
    rows = [replace(row, item="0") for row in make([("a", "x", "y"), ("b", "z", "z")])]
    write_lamp_predictions(tmp_path, "base", rows, data("lamp-4", "oppu"))
    assert official_pairs(tmp_path / GOLDS, tmp_path / "base.lamp.json", "LaMP_4") == [("y", "x"), ("z", "z")]
    assert json.loads((tmp_path / GOLDS).read_text())["golds"][1] == {"id": "b/0", "output": "z"}


def test_a_citation_gets_the_bracket_that_the_prompt_had() -> None:
    assert [official_output("lamp-1", text) for text in ("1]", " 2]\n", "[1]", "1", "3]")] == [
        *("[1]", "[2]", "[1]", "1", "3]")
    ]
    assert official_output("lamp-4", "1]") == "1]"


def test_other_data_has_no_such_file(tmp_path: Path, make: Any) -> None:
    write_lamp_predictions(tmp_path, "base", make([("a", "x", "y")]), DataConfig(path="x.jsonl"))
    assert not list(tmp_path.iterdir())
