"""Rows of data files: where they come from (`Source`), and templates that fill their columns into texts.

A template is plain text with `{column}` fields; it has no attributes, indices or format codes.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from string import Formatter
from typing import Any

from proper.data.chat import readable
from proper.data.values import plain
from proper.errors import DataError

Row = dict[str, Any]
"""One row's values by column."""


class BadValue(DataError):
    """A value of a row is unusable; `field` names the column, `what` gives the reason in a few words.

    The reason may be a function, where it takes long to find and most bad rows are only counted.
    """

    def __init__(self, field: str, what: str | Callable[[], str]) -> None:
        super().__init__(field)
        self.field, self._what = field, what

    @property
    def what(self) -> str:
        """The reason."""
        return self._what if isinstance(self._what, str) else self._what()

    def __str__(self) -> str:
        return f"{self.field}: {self.what}"


@dataclass(frozen=True)
class Source:
    """A named, streaming origin of rows: one file, or one Hugging Face dataset.

    `columns` is None if they are unknown (no line of a JSONL file is an object). `read(columns)` yields
    (row number from 1, values by column), or an error text in place of the values of a bad row. `typed` is false if
    all values are text because the format has no numbers. `every_column` reads the whole source for columns that only
    later rows have; None if `columns` are all.
    """

    name: str
    columns: tuple[str, ...] | None
    read: Callable[[Sequence[str]], Iterator[tuple[int, Row | str]]]
    typed: bool = True
    every_column: Callable[[], Collection[str]] | None = None


@dataclass(frozen=True, slots=True)
class Template:
    """A parsed template: literal texts alternating with columns, `literals[0] {columns[0]} literals[1] ...`.

    `key` is the setting that it comes from ("data.prompt"), for messages; `defaults` are texts for missing columns.
    """

    key: str
    literals: tuple[str, ...]
    columns: tuple[str, ...]
    defaults: Mapping[str, str] = field(default_factory=dict)

    def fill(self, values: Mapping[str, object]) -> str:
        """Return the text for one row.

        Raises:
            BadValue: a column without a default is missing, or one is null.
        """
        pieces = [self.literals[0]]
        for column, literal in zip(self.columns, self.literals[1:], strict=True):
            if column not in values and column not in self.defaults:
                raise BadValue(column, "missing")
            try:
                pieces.append(readable(plain(values[column] if column in values else self.defaults[column])))
            except ValueError as error:
                raise BadValue(column, str(error)) from None
            except RecursionError:
                raise BadValue(column, "nested too deep") from None
            pieces.append(literal)
        return "".join(pieces)


def parse_template(text: str, key: str) -> Template:
    """Parse `{column}` fields; `{{` and `}}` are literal braces. The whole text between braces is the column's name.

    Raises:
        DataError: a brace is not closed, or a field has no name, a conversion or a format code.
    """
    literals, columns = [""], []
    try:
        parts = list(Formatter().parse(text))
    except ValueError as error:
        raise DataError(f"{key}: not a template: {error} in {text!r}; write a brace as '{{{{' or '}}}}'") from error
    for literal, column, code, conversion in parts:
        literals[-1] += literal
        if column is None:
            continue
        if not column:
            raise DataError(f"{key}: a field without a column's name in {text!r}")
        if code or conversion:
            raise DataError(f"{key}: '{{{column}}}' takes a column's name and no format code, in {text!r}")
        columns.append(column)
        literals.append("")
    return Template(key, tuple(literals), tuple(columns))
