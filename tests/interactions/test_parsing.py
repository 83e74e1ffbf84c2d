from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from pyarrow import output_stream

from proper.config import DataConfig, TaskConfig, make_config
from proper.data.dataset import prepare
from proper.data.rows import BadValue
from proper.errors import DataError
from proper.interactions.log import LogEntry
from proper.interactions.parsing import plain_reader, read_file, read_users, record_reader, with_known_labels

ROW = {"input": "a", "output": "b"}


@pytest.mark.parametrize("said", ["7", 7, 7.0])
def test_a_row_may_name_its_user_as_the_runs_data_does(said: Any) -> None:
    read = record_reader(DataConfig(path="x"), TaskConfig(), "7")
    assert read({**ROW, "user_id": said}) == LogEntry("a", "b")


@pytest.mark.parametrize(
    ("said", "what"),
    [
        (2.0**53, "user_id: 9007199254740992.0: the id has lost digits; write it as text"),
        (9007199254740993, "user_id: is another user's"),
        (None, "user_id: is another user's"),
        (True, "user_id: a bool, expected text or a number"),
    ],
)
def test_a_row_of_a_user_who_cannot_be_told_is_refused(said: Any, what: str) -> None:
    read = record_reader(DataConfig(path="x"), TaskConfig(), "9007199254740992")
    with pytest.raises(BadValue) as caught:
        read({**ROW, "user_id": said})
    assert str(caught.value) == what


def test_times_are_those_of_data_files_and_files_may_be_packed(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl.zst"
    with output_stream(str(path), compression="zstd") as file:
        file.write(b'{"input": "a", "output": "b", "timestamp": 1700000000000000000}\n')
    assert read_file(path, record_reader(DataConfig(path="x"), TaskConfig(), "7")) == [LogEntry("a", "b", 1.7e9)]


def test_what_others_answered_is_unknown_for_submitted_rows() -> None:
    config = DataConfig(path="rows.jsonl", prompt="{title}, others {item_mean} ({item_count}):", target="{stars}")
    read = record_reader(config, TaskConfig(kind="rating"), "7")
    row = {"title": "Alien", "stars": 4}
    assert read(row) == LogEntry("Alien, others unknown (0):", "4")
    assert read({**row, "item_mean": "3.5"}) == LogEntry("Alien, others 3.5 (0):", "4")
    assert read({**row, "prompt": "final", "target": "2"}) == LogEntry("Alien, others unknown (0):", "4")


@pytest.mark.parametrize("column", ["user", "item", "time", "prompt"])
def test_an_id_that_is_a_column_of_the_run_is_no_interactions_own(column: str, tmp_path: Path) -> None:
    """Every interaction of a user but the first would be refused, for the same id with different content."""
    config = DataConfig.model_validate(
        {"path": "x", "prompt": "{input}", column: "{id}" if column == "prompt" else "id"}
    )
    path = tmp_path / "rows.jsonl"
    named = "" if column == "user" else '"user_id": "7", '
    path.write_text("".join(f'{{{named}"id": 7, "input": "a{at}", "output": "b"}}\n' for at in range(3)))
    assert [each.id for each in read_users(path, config, TaskConfig())["7"]] == [None] * 3
    usual = record_reader(DataConfig(path="x"), TaskConfig(), "7")
    assert usual({**ROW, "id": 7}).id == usual({"prompt": "a", "target": "b", "id": 7}).id == "7"


@pytest.mark.parametrize("kind", ["classification", "rating"])
def test_a_target_is_one_of_the_labels_of_the_runs_data(kind: str, tmp_path: Path) -> None:
    names = ["4", "5"] if kind == "rating" else ["4", "SPORTS"]
    rows = [{"user_id": f"u{at % 4}", "input": f"a{at}", "output": names[at % 2], "timestamp": at} for at in range(80)]
    (tmp_path / "rows.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    config = make_config({"data": {"path": str(tmp_path / "rows.jsonl")}, "task": {"kind": kind}})
    prepare(config, tmp_path / "data.sqlite", lambda prompts, targets: [1] * len(prompts)).close()
    task = with_known_labels(tmp_path, config.task)
    new, rows = tmp_path / "new.jsonl", [{"input": "a", "output": one} for one in (4.0, names[1], "4.50", "SPORT")]
    new.write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    for reader in (record_reader(config.data, task, "u1"), plain_reader(task, "input", "output")):
        with pytest.raises(DataError) as caught:
            read_file(new, reader)
        hint = f"known: {', '.join(names)}"
        assert str(caught.value) == f"{new}:3: output: '4.50' is none of the task's labels; {hint} (and 1 more bad row)"
        assert [reader({"input": "a", "output": one}).target for one in ("4.0", names[1])] == names
    (tmp_path / "data.sqlite").unlink()
    assert with_known_labels(tmp_path, config.task) == config.task
