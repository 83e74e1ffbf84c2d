"""Config of a run folder: paths that any current folder can use, and other settings that are told."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Any

import pytest

from proper.config import Config, make_config
from proper.errors import RunFolderError
from proper.models.tokenizer import backbone_location
from proper.run_config import claim, run_config


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with data, a list of users and a backbone, which is the current one."""
    shutil.copytree(backbone_location("proper-nano"), tmp_path / "models" / "own")
    for name in ("rows.jsonl", "gone.txt"):
        (tmp_path / name).write_text("")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def config(**more: Any) -> Config:
    return make_config({"data": {"path": "rows.jsonl", "train_without": "gone.txt"}, "backbone": "models/own", **more})


def test_a_run_made_with_relative_paths_is_used_from_any_folder(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    claim(place / "run", config())
    (place / "other").mkdir()
    monkeypatch.chdir(place / "other")
    found = run_config(place / "run")
    assert (found.backbone, found.data.path) == (str(place / "models" / "own"), str(place / "rows.jsonl"))
    assert found.data.train_without == str(place / "gone.txt")


def test_a_run_continues_from_the_folder_where_it_was_started(place: Path) -> None:
    before = claim(place / "run", config())
    text = (place / "run" / "config.yaml").read_text()
    # As earlier versions wrote it.
    (place / "run" / "config.yaml").write_text(text.replace(str(place / "models" / "own"), "models/own"))
    assert claim(place / "run", config()) == before
    with pytest.raises(RunFolderError, match="groups.experts is 5 there and 3 here"):
        claim(place / "run", config(groups={"experts": 3}))
    with pytest.raises(RunFolderError, match="groups.user_encoder is true there and false here"):
        claim(place / "run", config(groups={"user_encoder": False}))
    with pytest.raises(RunFolderError, match="split.max_queries is null there and 20 here"):
        claim(place / "run", config(split={"max_queries": 20}))


def test_a_name_of_a_backbone_stays_a_name(place: Path) -> None:
    os.mkdir("proper-nano")
    assert claim(place / "run", config(backbone="proper-nano")).backbone == "proper-nano"


@pytest.mark.parametrize("names", [["a"], ["a", "c"], ["b", "a"], ["a", "b", "c"]])
def test_a_run_of_other_tasks_is_not_continued(place: Path, names: list[str]) -> None:
    def tasks(names: list[str]) -> Config:
        return make_config({"tasks": {name: {"data": {"path": "rows.jsonl"}} for name in names}})

    claim(place / "run", tasks(["a", "b"]))
    with pytest.raises(RunFolderError, match=f"tasks are a, b there and {', '.join(names)} here"):
        claim(place / "run", tasks(names))
