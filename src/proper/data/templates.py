"""A template turns one row's columns into a text, and nothing else: no attributes, no indices, no format codes.

Knows nothing about files or tokens.
"""

from __future__ import annotations

import difflib
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import date, datetime
from string import Formatter

from proper.errors import DataError


class BadValue(Exception):
    """One value of a row is unusable; `field` names the column, `what` says why in a few words."""

    def __init__(self, field: str, what: str) -> None:
        super().__init__(f"{field}: {what}")
        self.field, self.what = field, what


def nearest(name: str, known: Sequence[str]) -> str:
    """Put the known name most like `name` into words, or all known names where none is like it."""
    close = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
    if close:
        return f"did you mean '{close[0]}'?"
    shown = ", ".join(known[:20]) + (", ..." if len(known) > 20 else "")
    return f"there are: {shown}" if known else "there are none"


def plain(value: object) -> str:
    """Write one value as text: 4.0 stays "4.0", a list is joined with ", ", a time is ISO 8601.

    Raises:
        ValueError: there is no text in it (null, NaN, bytes); the message says what it is.
    """
    if isinstance(value, str):
        return value
    if value is None:
        raise ValueError("null")
    if isinstance(value, float) and math.isnan(value):
        raise ValueError("NaN")
    if isinstance(value, bytes):
        raise ValueError("bytes, where text is wanted")
    if isinstance(value, list | tuple):
        return ", ".join(plain(each) for each in value)
    if isinstance(value, dict):
        return json.dumps(value, ensure_ascii=False, default=str)
    if isinstance(value, date | datetime):
        return value.isoformat()
    return str(value)


@dataclass(frozen=True, slots=True)
class Template:
    """A parsed template: literal texts alternating with columns, `literals[0] {columns[0]} literals[1] ...`.

    `key` is the setting it comes from ("data.prompt"), for messages.
    """

    key: str
    literals: tuple[str, ...]
    columns: tuple[str, ...]

    def fill(self, values: Mapping[str, object]) -> str:
        """Return the text for one row.

        Raises:
            BadValue: a column is missing or null.
        """
        pieces = [self.literals[0]]
        for column, literal in zip(self.columns, self.literals[1:], strict=True):
            if column not in values:
                raise BadValue(column, "missing")
            try:
                pieces.append(plain(values[column]))
            except ValueError as error:
                raise BadValue(column, str(error)) from None
            pieces.append(literal)
        return "".join(pieces)


def parse_template(text: str, key: str) -> Template:
    """Parse `{column}` places; `{{` and `}}` are braces. Everything between the braces is the column's name.

    Raises:
        DataError: a brace is not closed, or a place has no name, a conversion or a format code.
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
            raise DataError(f"{key}: a place without a column's name in {text!r}")
        if code or conversion:
            raise DataError(f"{key}: '{{{column}}}' takes a column's name and no format code, in {text!r}")
        columns.append(column)
        literals.append("")
    return Template(key, tuple(literals), tuple(columns))
