"""Prompt and target templates: `{column}` fields only, without attributes, indices or format codes.

Also conversion of cell values and ids to text.
"""

from __future__ import annotations

import difflib
import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import date, datetime
from decimal import Decimal
from string import Formatter

from proper.errors import DataError


class BadValue(Exception):
    """A value of a row is unusable; `field` names the column, `what` gives the reason in a few words."""

    def __init__(self, field: str, what: str) -> None:
        super().__init__(f"{field}: {what}")
        self.field, self.what = field, what


@dataclass(frozen=True, slots=True)
class Unreadable:
    """Placeholder in a cell for a value that Python cannot represent; `what` describes it in a few words."""

    what: str


class Rounded(float):
    """A float32 or float16 value too large to identify one whole number."""


def nearest(name: str, known: Sequence[str]) -> str:
    """Return a "did you mean" hint with the closest known name, or the list of known names if none is close."""
    close = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
    if close:
        return f"did you mean '{close[0]}'?"
    shown = ", ".join(known[:20]) + (", ..." if len(known) > 20 else "")
    return f"there are: {shown}" if known else "there are none"


def plain(value: object) -> str:
    """Convert one value to text: 4.0 stays "4.0", a list is joined with ", ", a time is ISO 8601.

    Raises:
        ValueError: the value has no text form (null, NaN, bytes); the message says what it is.
    """
    if isinstance(value, str):
        return value
    if value is None:
        raise ValueError("null")
    if isinstance(value, float) and math.isnan(value):
        raise ValueError("NaN")
    if isinstance(value, bytes):
        raise ValueError("bytes, where text is wanted")
    if isinstance(value, Unreadable):
        raise ValueError(value.what)
    if isinstance(value, list | tuple):
        return ", ".join(plain(each) for each in value)
    if isinstance(value, dict):
        return json.dumps(value, ensure_ascii=False, default=str)
    if isinstance(value, date | datetime):
        return value.isoformat()
    return str(value)


_EXACT = 2**53
"""From this value on, a float no longer distinguishes neighbouring whole numbers."""

_FLOAT_ID = re.compile(r"[-+]?(\d+\.0+|\d(\.\d+)?[eE]\+\d+)")


def identifier(value: object) -> str | None:
    """Convert an id to text: a whole number as its digits (7.0 is "7"), None for null and NaN.

    Floats are accepted because formats without a null for integers turn ids into floats.

    Raises:
        ValueError: the value is not an id, or is a float that stands for several whole numbers.
    """
    if value is None or isinstance(value, str):
        return value
    if isinstance(value, bool | list | tuple | dict | bytes):
        raise ValueError(f"a {type(value).__name__}, where text or a number is wanted")
    if not isinstance(value, float | Decimal):
        return plain(value)
    if isinstance(value, float) and math.isnan(value):
        return None
    if not math.isfinite(value) or value != value // 1:
        raise ValueError(f"{value} is no whole number; write the id as text")
    if isinstance(value, float) and (abs(value) >= _EXACT or isinstance(value, Rounded)):
        raise ValueError(f"{value}: the id has lost digits; write it as text")
    return str(int(value))


def written_id(value: object) -> object:
    """Return the value of an untyped cell: a float if the text is a whole number in float notation, else unchanged."""
    return float(value) if isinstance(value, str) and _FLOAT_ID.fullmatch(value) else value


@dataclass(frozen=True, slots=True)
class Template:
    """A parsed template: literal texts alternating with columns, `literals[0] {columns[0]} literals[1] ...`.

    `key` is the setting that it comes from ("data.prompt"), for messages.
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
            raise DataError(f"{key}: a place without a column's name in {text!r}")
        if code or conversion:
            raise DataError(f"{key}: '{{{column}}}' takes a column's name and no format code, in {text!r}")
        columns.append(column)
        literals.append("")
    return Template(key, tuple(literals), tuple(columns))
