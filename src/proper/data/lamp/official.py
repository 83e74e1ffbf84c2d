"""Reader of the official LaMP files: questions with profiles, and outputs in a second file.

`{train,dev}_questions.json` is a list of `{"id", "input", "profile": [{"id", ...fields}]}`, `{train,dev}_outputs.json`
is `{"task", "golds": [{"id", "output"}]}`. The dev questions are the queries; train questions are history.
"""

from __future__ import annotations

import json
import os
import sqlite3
from collections.abc import Iterator
from hashlib import blake2b
from pathlib import Path

from proper.config import DataConfig
from proper.config.lamp_tasks import LAMP_TASKS, LampTask
from proper.data.lamp.rows import Question, Row, RowMaker, paper_titles, row_maker
from proper.data.rows import Source
from proper.data.text_files import json_entries, json_value
from proper.data.values import plain
from proper.errors import DataError

_QUESTIONS = "{}_questions.json"
_OUTPUTS = "{}_outputs.json"


def lamp_sources(config: DataConfig) -> list[Source]:
    """Open the questions in the folder `config.path`: train if it exists, and dev.

    Raises:
        DataError: the dev questions or an outputs file are missing, or the outputs are of another task.
    """
    folder, task = Path(os.path.expanduser(config.path)), LAMP_TASKS[str(config.task)]
    if not folder.is_dir():
        split = " --split time" if folder.name.endswith("-time") else ""
        raise DataError(f"{config.path}: no such folder (data.path); get it with: proper data fetch {task.name}{split}")
    parts = [part for part in ("train", "dev") if (folder / _QUESTIONS.format(part)).is_file()]
    if "dev" not in parts:
        raise DataError(f"{config.path}: no dev_questions.json in this folder, so there are no queries (data.path)")
    for part in parts:
        _check_outputs(folder / _OUTPUTS.format(part), task)
    first = folder / _QUESTIONS.format(parts[0])
    maker = row_maker(task, config.layout, paper_titles(_profiles(first)) if task.name == "lamp-1" else ())
    return [_source(folder, part, maker) for part in parts]


def user_of(entry: dict[str, object]) -> str:
    """Return the user id of a question: its `user_id` if the file has one, else a hash of the profile.

    Without ids, questions with identical profiles belong to one user; any difference makes a new user, so that two
    users are never merged.
    """
    user = entry.get("user_id")
    if isinstance(user, str | int) and not isinstance(user, bool) and str(user).strip():
        return str(user)
    content = json.dumps(entry.get("profile"), sort_keys=True).encode()
    return f"profile-{blake2b(content, digest_size=8).hexdigest()}"


def _check_outputs(path: Path, task: LampTask) -> None:
    if not path.is_file():
        raise DataError(f"{path}: no such file; the questions' answers are in it")
    found = json_value(path, "task")
    if found not in (task.official, task.output_name("oppu")):
        raise DataError(f"{path}: task: {found!r}; data.task {task.name} needs '{task.official}'")


def _profiles(path: Path) -> Iterator[tuple[str, object]]:
    for _, entry in json_entries(path):
        if isinstance(entry, dict):
            yield user_of(entry), entry.get("profile")


def _source(folder: Path, part: str, maker: RowMaker) -> Source:
    questions, outputs = folder / _QUESTIONS.format(part), folder / _OUTPUTS.format(part)
    return Source(str(questions), maker.columns, lambda wanted: _rows(questions, outputs, maker, part == "dev"))


def _rows(questions: Path, outputs: Path, maker: RowMaker, query: bool) -> Iterator[tuple[int, Row | str]]:
    golds = _Golds(outputs)
    number = 0
    try:
        for number, entry in json_entries(questions):
            for row in _entry_rows(entry, golds, maker, query):
                yield number, row
        for identity in golds.left():
            yield number, f"question '{identity}': missing, and {outputs.name} has its answer"
    finally:
        golds.close()


def _entry_rows(entry: object, golds: _Golds, maker: RowMaker, query: bool) -> Iterator[Row | str]:
    if not isinstance(entry, dict):
        yield "no object"
        return
    missing = next((key for key in ("id", "input", "profile") if entry.get(key) is None), None)
    if missing is not None:
        yield f"{missing}: missing"
        return
    identity = plain(entry["id"])
    answer = golds.take(identity)
    if answer is None:
        yield f"question '{identity}': no answer, or its answer is already used, in {golds.path.name}"
        return
    question = Question(identity, plain(entry["input"]), answer, query, entry.get("date"))
    yield from maker.rows(user_of(entry), entry["profile"], [question])


class _Golds:
    """Answers by question id, each taken once; kept in a temporary file, so that memory does not grow."""

    def __init__(self, path: Path) -> None:
        self.path = path
        # An empty name opens a private on-disk database that is deleted when it is closed.
        self.connection = sqlite3.connect("", isolation_level=None)
        self.connection.execute("CREATE TABLE golds(id TEXT PRIMARY KEY, output TEXT NOT NULL) WITHOUT ROWID")
        self.connection.execute("BEGIN")
        for number, gold in json_entries(path, "golds.item"):
            if not isinstance(gold, dict) or gold.get("id") is None or gold.get("output") is None:
                raise DataError(f"{path}:{number}: an answer has id and output")
            try:
                row = (plain(gold["id"]), plain(gold["output"]))
                self.connection.execute("INSERT INTO golds VALUES (?, ?)", row)
            except sqlite3.IntegrityError as error:
                raise DataError(f"{path}:{number}: id: '{plain(gold['id'])}' occurs twice") from error

    def take(self, identity: str) -> str | None:
        """Return and remove the answer of a question; None if there is none or it was taken."""
        found = self.connection.execute("DELETE FROM golds WHERE id = ? RETURNING output", (identity,)).fetchall()
        return str(found[0][0]) if found else None

    def left(self) -> Iterator[str]:
        """Yield the ids of answers that were not taken."""
        return (identity for (identity,) in self.connection.execute("SELECT id FROM golds ORDER BY id"))

    def close(self) -> None:
        """Remove the temporary file."""
        self.connection.close()
