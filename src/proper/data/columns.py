"""Columns of the sources that a run reads: those that templates and settings name, checked before the first row."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from functools import lru_cache
from typing import Literal, Protocol

from proper.config import DataConfig
from proper.data.conversations import COMPLETION, MESSAGES, PROMPT
from proper.data.rows import Source, Template
from proper.errors import DataError, did_you_mean

_CONVERSATION = {"messages": (MESSAGES,), "completion": (PROMPT, COMPLETION)}


class NamesColumns(Protocol):
    """What names the columns of rows; `interactions.RowFormat` is it."""

    @property
    def user(self) -> str | None: ...  # noqa: D102
    @property
    def time(self) -> str | None: ...  # noqa: D102
    @property
    def item(self) -> str | None: ...  # noqa: D102
    @property
    def prompt(self) -> Template: ...  # noqa: D102
    @property
    def target(self) -> Template: ...  # noqa: D102
    def kind(self, columns: Collection[str]) -> Literal["template", "messages", "completion"]: ...  # noqa: D102


def columns_to_read(
    row_format: NamesColumns, sources: Sequence[Source], task_column: str | None = None
) -> list[list[str]]:
    """List the columns to read from each source.

    With a `task_column`, a source need not have every column, since its rows may all be of other tasks; a row of this
    task without one is a bad row.

    Raises:
        DataError: a column is missing, with a `task_column` from all sources, or a source has it twice.
    """

    @lru_cache
    def is_somewhere(column: str) -> bool:
        if any(source.columns is None or column in source.columns for source in sources):
            return True
        return any(source.every_column is not None and column in source.every_column() for source in sources)

    def may_lack(column: str) -> bool:
        return task_column is not None and column != task_column and is_somewhere(column)

    return [_present(_named(row_format, source, task_column), source, may_lack) for source in sources]


def _named(row_format: NamesColumns, source: Source, task_column: str | None) -> dict[str, str]:
    """Return the columns of a source that are read, each with the setting that names it."""
    have = source.columns or ()
    named = {row_format.user: "data.user"} if row_format.user is not None else {}
    if task_column is not None:
        named[task_column] = "data.task_column"
    kind = row_format.kind(have)
    if kind == "template":
        for template in (row_format.prompt, row_format.target):
            needed = [name for name in template.columns if name not in template.defaults or name in have]
            named.update(dict.fromkeys(needed, template.key))
        if set(row_format.target.columns) <= set(row_format.prompt.columns):
            raise DataError("data.prompt: has every column of data.target, so each prompt would contain its answer")
    else:
        named.update(dict.fromkeys(_CONVERSATION[kind], "data.rows"))
    defaults = DataConfig.model_fields
    for column, key in ((row_format.time, "time"), (row_format.item, "item")):
        if column is not None and (column != defaults[key].default or column in have):
            named.setdefault(column, f"data.{key}")
    return named


def _present(named: Mapping[str, str], source: Source, may_lack: Callable[[str], bool]) -> list[str]:
    """List the named columns that a source has; raise DataError for the first missing or repeated one."""
    have, found = source.columns, list[str]()
    for column, key in named.items():
        if have is not None and column not in have:
            if may_lack(column):
                continue
            raise DataError(f"{source.name}: no column '{column}' ({key}); {did_you_mean(column, have)}")
        if have is not None and have.count(column) > 1:
            raise DataError(f"{source.name}: {have.count(column)} columns are called '{column}' ({key})")
        found.append(column)
    return found
