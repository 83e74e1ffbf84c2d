"""Parsing of submitted rows into log entries: rows in the run's own columns, or plain prompt and target texts.

    {"prompt": final text, "target": text}          final texts, as the model sees them
    the columns of data.prompt and data.target      as in the run's data, filled into its templates

The target of a task with labels is one of them: of those configured or, with `labels: auto`, of the run's data.
Both may have an `id`, unless the run's data has a column of that name, and a time in the run's time column or in
`timestamp`.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from proper.config import DataConfig, TaskConfig
from proper.data.dataset import Dataset
from proper.data.interactions import BadRows, Interaction, RowFormat
from proper.data.item_evidence import neutral
from proper.data.rows import BadValue, parse_template
from proper.data.text_files import json_rows
from proper.data.values import identifier
from proper.errors import DataError
from proper.interactions.log import LogEntry
from proper.run_folder import RunFolder

Read = Callable[[Mapping[str, Any]], LogEntry]
_ID, _TIME = "id", "timestamp"


def with_known_labels(run: Path, task: TaskConfig) -> TaskConfig:
    """Return the task of a run with the labels that `labels: auto` found in the run's data, if that still exists.

    Raises:
        RunFolderError: the data cannot be read.
    """
    data = RunFolder(run).home.data
    if task.kind == "generation" or task.labels != "auto" or not data.is_file():
        return task
    with Dataset.open(data) as dataset:
        return task.model_copy(update={"labels": dataset.labels})


def plain_reader(task: TaskConfig, prompt: str, target: str) -> Read:
    """Return a parser of rows with final texts in the fields named `prompt` and `target`, and perhaps a `timestamp`.

    The parser raises `BadValue`, which names the field, for an invalid row.
    """
    row_format = _plain_format(task, prompt, target)
    return lambda row: _entry(row_format.interaction(row), row.get(_ID))


def _plain_format(task: TaskConfig, prompt: str, target: str) -> RowFormat:
    texts = parse_template(f"{{{prompt}}}", "data.prompt"), parse_template(f"{{{target}}}", "data.target")
    return RowFormat(None, _TIME, None, *texts, task)


def record_reader(config: DataConfig, task: TaskConfig, user: str) -> Read:
    """Return a parser of one user's rows, in the run's own columns or as plain `prompt` and `target`.

    The parser raises `BadValue` for a row that is invalid or names another user.
    """
    plain = _plain_format(task, "prompt", "target")
    own = replace(RowFormat.of(config, task), item=None, query=False)
    # The markers of what other users answered are filled when a run reads its data; here, as for an unknown item.
    own = replace(own, prompt=neutral(own.prompt))
    columns = {*own.prompt.columns, *own.target.columns} - {*own.prompt.defaults}
    # As a column of the run, say the user's, it is no interaction's own, and several have the same.
    numbered = _ID not in {config.user, config.time, config.item, *columns}

    def read(row: Mapping[str, Any]) -> LogEntry:
        try:
            named = identifier(row.get(config.user, user))
        except ValueError as error:
            raise BadValue(config.user, str(error)) from None
        if named != user:
            raise BadValue(config.user, "is another user's")
        if not columns <= {*row} and {"prompt", "target"} <= {*row}:
            found = plain.interaction(row)
        else:
            found = own.interaction({**row, config.user: user})
        return _entry(found, row.get(_ID) if numbered else None)

    return read


def read_file(path: Path, read: Read) -> list[LogEntry]:
    """Read a JSONL file with one interaction per line.

    Raises:
        DataError: the file cannot be read, is empty, or has bad rows; names the first as FILE:LINE, counts the others.
    """
    entries = read_rows(((f"{path}:{number}", row) for number, row in json_rows(path)), read)
    if not entries:
        raise DataError(f"{path}: there is no interaction in it")
    return entries


def read_users(path: Path, config: DataConfig, task: TaskConfig) -> dict[str, list[LogEntry]]:
    """Read a JSONL file with one interaction per line, each with its user in the run's user column.

    Returns:
        The users' interactions, in the file's order.

    Raises:
        DataError: as for `read_file`; a row names no user.
    """
    readers: dict[str, Read] = {}
    users: list[str] = []

    def read(row: Mapping[str, Any]) -> LogEntry:
        try:
            user = identifier(row.get(config.user))
        except ValueError as error:
            raise BadValue(config.user, str(error)) from None
        if user is None:
            raise BadValue(config.user, "missing")
        if user not in readers:
            readers[user] = record_reader(config, task, user)
        entry = readers[user](row)
        users.append(user)
        return entry

    entries = read_file(path, read)
    found: dict[str, list[LogEntry]] = {}
    for user, entry in zip(users, entries, strict=True):
        found.setdefault(user, []).append(entry)
    return found


def read_rows(rows: Iterable[tuple[str, Mapping[str, Any] | str]], read: Read) -> list[LogEntry]:
    """Parse (name, row) pairs; a string in place of a row is the error message of that row.

    Raises:
        DataError: a row is bad; names the first, counts the others.
    """
    entries, bad = list[LogEntry](), BadRows()
    for name, row in rows:
        try:
            if isinstance(row, str):
                raise BadValue("row", row)
            entries.append(read(row))
        except BadValue as error:
            bad.add(name, error)
    if bad.count:
        others = f" (and {bad.count - 1:,} more bad row{'s' * (bad.count > 2)})" if bad.count > 1 else ""
        raise DataError(f"{bad.first[0]}{others}")
    return entries


def _entry(found: Interaction, own: Any) -> LogEntry:
    if own is not None and (isinstance(own, bool) or not isinstance(own, str | int) or not str(own).strip()):
        raise BadValue(_ID, "should be text or a whole number, and not empty")
    try:
        json.dumps(own, ensure_ascii=False).encode()
    except UnicodeEncodeError:
        raise BadValue(_ID, "half of a surrogate pair, which is no character") from None
    return LogEntry(found.prompt, found.target, found.time, None if own is None else str(own))
