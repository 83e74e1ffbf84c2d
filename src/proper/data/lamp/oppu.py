"""Reader of OPPU's released files: LaMP regrouped by user, with the most active users in a separate file.

`user_others.json` and `user_top_100_history.json` (tweets: `user_more_100_history.json`) are lists of
`{"user_id", "profile": [...], "query": [{"id", "input", "gold"}]}`. The queries of the second file are the test set;
the queries of the other users count as their history.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

from proper.config import DataConfig
from proper.config.lamp_tasks import LAMP_TASKS
from proper.data.lamp.rows import Question, Row, RowMaker, paper_titles, row_maker
from proper.data.rows import Source
from proper.data.text_files import json_entries
from proper.data.values import plain
from proper.errors import DataError

_OTHERS = "user_others.json"
_TESTED = ("user_top_100_history.json", "user_more_100_history.json")


def oppu_sources(config: DataConfig) -> list[Source]:
    """Open the files in the folder `config.path`: the other users if the file exists, and the test users.

    Raises:
        DataError: there is no file of test users, or there are both.
    """
    folder, task = Path(os.path.expanduser(config.path)), LAMP_TASKS[str(config.task)]
    if not folder.is_dir():
        raise DataError(f"{config.path}: no such folder (data.path)")
    tested = [folder / name for name in _TESTED if (folder / name).is_file()]
    if len(tested) != 1:
        problem = "both" if tested else "neither"
        raise DataError(f"{config.path}: {problem} of {' and '.join(_TESTED)} in this folder; expected one")
    others = [folder / _OTHERS] if (folder / _OTHERS).is_file() else []
    files = [*others, *tested]
    titles = paper_titles(_profiles(files)) if task.name == "lamp-1" else ()
    maker = row_maker(task, config.layout, titles)
    return [_source(file, maker, file in tested) for file in files]


def _profiles(files: list[Path]) -> Iterator[tuple[str, object]]:
    for file in files:
        for _, entry in json_entries(file):
            if isinstance(entry, dict):
                yield str(entry.get("user_id")), entry.get("profile")


def _source(file: Path, maker: RowMaker, query: bool) -> Source:
    return Source(str(file), maker.columns, lambda wanted: _rows(file, maker, query))


def _rows(file: Path, maker: RowMaker, query: bool) -> Iterator[tuple[int, Row | str]]:
    for number, entry in json_entries(file):
        for row in _entry_rows(entry, maker, query):
            yield number, row


def _entry_rows(entry: object, maker: RowMaker, query: bool) -> Iterator[Row | str]:
    if not isinstance(entry, dict):
        yield "no object"
        return
    user, asked = entry.get("user_id"), entry.get("query")
    if not isinstance(user, str | int) or isinstance(user, bool) or not str(user).strip():
        yield "user_id: missing, or neither text nor a whole number"
        return
    if not isinstance(asked, list):
        yield "query: missing, or no list"
        return
    questions = []
    for index, each in enumerate(asked):
        fields = each if isinstance(each, dict) else {}
        missing = next((key for key in ("id", "input", "gold") if fields.get(key) is None), None)
        if missing is not None:
            yield f"query[{index}].{missing}: missing"
        else:
            question = Question(plain(each["id"]), plain(each["input"]), each["gold"], query, each.get("date"))
            questions.append(question)
    yield from maker.rows(str(user), entry.get("profile"), questions)
