"""Conversion of rows to interactions: map columns, fill prompt and target templates, count and report bad rows."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Literal

from proper.config import DataConfig, TaskConfig
from proper.data.columns import columns_to_read
from proper.data.conversations import COMPLETION, MESSAGES, PROMPT, completion_row, messages_row
from proper.data.item_evidence import marked
from proper.data.rows import BadValue, Source, Template, parse_template
from proper.data.sources import open_sources
from proper.data.task_rows import TaskRows
from proper.data.values import (
    MAX_ID_LENGTH,
    find_label,
    identifier,
    is_written_null,
    label_key,
    no_rating,
    parse_time,
    rating_of,
    written_id,
)
from proper.errors import DataError, did_you_mean, shortened

_SHOWN = 20


@dataclass(frozen=True, slots=True)
class Interaction:
    """One valid row. `time` is in seconds since 1970, UTC; `query` is true if the files name it as a test query.

    `task` is the number of the row's task, from 0.
    """

    user: str
    prompt: str
    target: str
    item: str | None
    time: float | None
    query: bool = False
    task: int = 0


@dataclass
class BadRows:
    """Number of bad rows, and messages of the first 20 as "FILE:LINE: field: what is wrong"."""

    count: int = 0
    first: list[str] = field(default_factory=list)

    def add(self, where: str, error: BadValue) -> None:
        """Count one bad row."""
        self.count += 1
        if len(self.first) < _SHOWN:
            self.first.append(f"{where}: {error}")

    def message(self, *, all_bad: bool = False) -> str:
        """Return one line with the first bad row and the number of bad rows; leaving out all rows is no advice."""
        if all_bad:
            return f"{self.first[0]} (no row is good, of {self.count:,})"
        if self.count == 1:
            return f"{self.first[0]} (--skip-bad-rows leaves it out)"
        more = self.count - 1
        return f"{self.first[0]} (and {more:,} more bad row{'s' * (more > 1)}; --skip-bad-rows leaves them out)"


def read_interactions(
    config: DataConfig, bad: BadRows, task: TaskConfig | None = None, own: TaskRows | None = None
) -> Iterator[Interaction]:
    """Yield the good rows of `config.path` one by one; count the others in `bad`.

    With a `task`, the target is checked too: a number for ratings, one of the labels if they are configured. With
    `own`, only that task's rows are read.
    Every file is opened and its columns are checked before the first row is yielded.

    Raises:
        DataError: there is nothing to read, a template is malformed, or a column is missing.
    """
    row_format = RowFormat.of(config, task or TaskConfig())
    _check_labels(row_format.task)
    if config.rows in ("auto", "template") and not row_format.target.columns:
        raise DataError(f"data.target: {config.target!r} names no column, so every answer would be the same")
    sources = open_sources(config)
    wanted = columns_to_read(row_format, sources, config.task_column)
    return _read(row_format, config.path, sources, wanted, bad, own or TaskRows())


def _check_labels(task: TaskConfig) -> None:
    """Raise DataError if a configured label is empty or no rating, or if two are the same label."""
    known: dict[float | str | None, str] = {}
    for label in () if task.labels == "auto" else task.labels:
        if not label.strip():
            raise DataError(f"task.labels: {label!r} is empty")
        if task.kind == "rating" and rating_of(label) is None:
            raise DataError(f"task.labels: {label!r} is {no_rating(label)}, as ratings are")
        key = label_key(label, task.kind)
        if key in known:
            raise DataError(f"task.labels: {known[key]!r} and {label!r} are the same label; leave one out")
        known[key] = label


def _read(
    row_format: RowFormat,
    path: str,
    sources: Sequence[Source],
    wanted: Sequence[Sequence[str]],
    bad: BadRows,
    own: TaskRows,
) -> Iterator[Interaction]:
    seen = False
    for source, columns in zip(sources, wanted, strict=True):
        for number, row in source.read(columns):
            seen = True
            try:
                if isinstance(row, str):
                    if own.counts:
                        raise BadValue("row", row)
                    continue
                if not own.takes(row):
                    continue
                interaction = _of_file(row_format.interaction(row, source.typed), row_format, source)
            except BadValue as error:
                bad.add(f"{source.name}:{number}", error)
            else:
                yield interaction
    if not seen:
        raise DataError(f"{path}: empty: no row in it")


def _of_file(found: Interaction, row_format: RowFormat, source: Source) -> Interaction:
    """Return an interaction, without its item if that id is a written null; refuse such a user id."""
    if is_written_null(found.user, source.typed):
        raise BadValue(str(row_format.user), f"{found.user!r} stands for a missing id")
    return replace(found, item=None) if is_written_null(found.item, source.typed) else found


@dataclass(frozen=True)
class RowFormat:
    """Format of rows: the columns of user, time and item, the templates of prompt and target, and the task.

    Attributes:
        user: the user's column; None for rows without one, whose interactions have the user "".
        query: whether the column `query` marks test queries.
        rows: whether rows fill the templates or hold a conversation; `auto` goes by each row's columns.
    """

    user: str | None
    time: str | None
    item: str | None
    prompt: Template
    target: Template
    task: TaskConfig
    query: bool = False
    rows: Literal["auto", "template", "messages", "completion"] = "template"

    @classmethod
    def of(cls, config: DataConfig, task: TaskConfig) -> RowFormat:
        """Return the format that a config describes.

        Raises:
            DataError: a template is malformed.
        """
        prompt = marked(parse_template(config.prompt, "data.prompt"))
        target = parse_template(config.target, "data.target")
        given = config.given_split or {config.prompt, config.target} != {_default("prompt"), _default("target")}
        rows = "template" if config.rows == "auto" and given else config.rows
        return cls(config.user, config.time, config.item, prompt, target, task, config.given_split, rows)

    def kind(self, columns: Collection[str]) -> Literal["template", "messages", "completion"]:
        """Return what rows with these columns hold; `auto` is a conversation if the templates' columns are missing."""
        if self.rows != "auto":
            return self.rows
        if {*self.prompt.columns, *self.target.columns} <= {*columns}:
            return "template"
        if MESSAGES in columns:
            return "messages"
        return "completion" if {PROMPT, COMPLETION} <= {*columns} else "template"

    def interaction(self, row: Mapping[str, object], typed: bool = True) -> Interaction:
        """Convert a row to an interaction or raise BadValue; without `typed` all values are text."""
        user = "" if self.user is None else _user(row, self.user, typed)
        asked, answered, prompt, target = self._texts(row)
        if not prompt.strip():
            raise BadValue(asked, "empty")
        item = _identifier(row, self.item, typed)
        item = item if item and item.strip() else None
        for name, text in ((self.user, user), (asked, prompt), (self.item, item)):
            _check_characters(str(name), text)
        query = self.query and bool(row.get("query"))
        return Interaction(user, prompt, self._answer(answered, target.strip()), item, self._time(row), query)

    def _texts(self, row: Mapping[str, object]) -> tuple[str, str, str, str]:
        """Return the names of prompt and target for messages, and their texts."""
        kind = self.kind(row)
        if kind == "template":
            prompt, target = self.prompt.fill(row), self.target.fill(row)
            return _name(self.prompt), _name(self.target), prompt, target
        if kind == "messages":
            return MESSAGES, MESSAGES, *messages_row(row)
        return PROMPT, COMPLETION, *completion_row(row)

    def _answer(self, name: str, target: str) -> str:
        if not target:
            raise BadValue(name, "empty")
        _check_characters(name, target)
        labels = self.task.labels if self.task.kind != "generation" and self.task.labels != "auto" else None
        if self.task.kind == "rating" and rating_of(target) is None:
            raise BadValue(name, f"{_short(target)} is {no_rating(target)}")
        if labels is None:
            return target
        found = find_label(target, labels, self.task.kind)
        if found is None:
            raise BadValue(
                name, lambda: f"{_short(target)} is none of the task's labels; {did_you_mean(target, labels)}"
            )
        return found

    def _time(self, row: Mapping[str, object]) -> float | None:
        column = self.time
        value = row.get(column) if column is not None else None
        if value is None:
            return None
        try:
            return parse_time(value)
        except ValueError as error:
            raise BadValue(str(column), str(error)) from None


def _default(key: str) -> object:
    return DataConfig.model_fields[key].default


def _name(template: Template) -> str:
    """Return a template's name for messages: its column if it has exactly one, else its setting."""
    return template.columns[0] if len(set(template.columns)) == 1 else template.key


def _user(row: Mapping[str, object], column: str, typed: bool) -> str:
    user = _identifier(row, column, typed)
    if user is None:
        raise BadValue(column, "null" if column in row else "missing")
    if not user.strip():
        raise BadValue(column, "empty")
    if len(user) > MAX_ID_LENGTH:
        raise BadValue(column, f"longer than {MAX_ID_LENGTH} characters")
    return user


def _identifier(row: Mapping[str, object], column: str | None, typed: bool) -> str | None:
    """Return a user or item id as text; see `identifier`."""
    value = row.get(column) if column is not None else None
    try:
        return identifier(value if typed else written_id(value))
    except ValueError as error:
        raise BadValue(str(column), str(error)) from None


def _check_characters(name: str, text: str | None) -> None:
    if text is None or text.isascii():
        return
    try:
        text.encode()
    except UnicodeEncodeError:
        raise BadValue(name, "half of a surrogate pair, which is no character") from None


def _short(text: str) -> str:
    return repr(shortened(text))
