"""`data.train_without`: users whose rows no stage of a run uses."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from proper.config import make_config
from proper.data.dataset import Dataset, prepare
from proper.errors import DataError
from proper.interactions.personal_files import remove_rows


def no_tokens(prompts: list[str], targets: list[str]) -> list[int]:
    return [2] * len(prompts)


def prepared(place: Path, without: str | None) -> Dataset:
    rows = [
        {"user_id": user, "input": f"{user} {at}", "output": "x"}
        for user in ("ann", "bo", " eve", "7")
        for at in range(9)
    ]
    (place / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    split = {"target_users": 9, "min_history": 2}
    data = {"path": str(place / "rows.jsonl"), "train_without": without}
    return prepare(make_config({"data": data, "split": split}), place / "data.sqlite", no_tokens)


def test_users_of_the_file_are_in_no_history_query_or_sample(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "without.txt").write_text("ann\n\n 7 \nnobody\n", "utf-8-sig")
    with prepared(tmp_path, str(tmp_path / "without.txt")) as dataset:
        assert {user.id for user in dataset.users()} == {"bo", " eve"}
        assert {row.user for row in dataset.sample("all", None, 0).rows(0)} == {"bo", " eve"}
        assert {row.user for row in dataset.queries()} == {"bo", " eve"}
        without = dataset.sha256
    assert caplog.messages == ["data.train_without: 1 of its 3 users have no rows in the data"]
    caplog.clear()
    with prepared(tmp_path, None) as dataset:
        assert {user.id for user in dataset.users()} == {"ann", "bo", " eve", "7"} and dataset.sha256 != without
    assert not caplog.messages
    assert b"ann" in (tmp_path / "data.sqlite").read_bytes()
    remove_rows(tmp_path / "data.sqlite", {"ann", "nobody"})
    with Dataset.open(tmp_path / "data.sqlite") as dataset:
        assert {user.id for user in dataset.users()} == {"bo", " eve", "7"}
    assert b"ann" not in (tmp_path / "data.sqlite").read_bytes()


def test_a_missing_file_names_the_key(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"data.train_without: .*none.txt: cannot be read: No such file"):
        prepared(tmp_path, str(tmp_path / "none.txt"))
    (tmp_path / "all.txt").write_text("ann\nbo\n eve\n7\n")
    with pytest.raises(DataError, match="data.train_without"):
        prepared(tmp_path, str(tmp_path / "all.txt"))
