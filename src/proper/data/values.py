"""Values of data files: conversion of cells to text, ids and times, and equality of labels.

"3" and "3.0" are one label: a column of integers with a missing value becomes a column of floats, so both spellings
occur in one dataset. So are two spellings that look the same, such as a composed and a decomposed "é".
"""

from __future__ import annotations

import json
import math
import re
import unicodedata
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from datetime import UTC, date, datetime
from decimal import Decimal

from proper.errors import shortened

OUT_OF_RANGE = "a time outside of the years 1 to 9999"

MAX_ID_LENGTH = 512
"""Characters of the longest user id; the server accepts no longer one."""

_EXACT = 2**53
"""From this value on, a float no longer distinguishes neighbouring whole numbers."""

# Java's programs write 12345678 as 1.2345678E7; without a point, 7e12345 may be a hash.
_FLOAT_ID = re.compile(r"[-+]?(\d+\.0+|\d(\.\d+)?[eE]\+\d+|\d\.\d+E\d+)")
# Spreadsheets write a long number as they show it, with few digits: 123456789012 is 1.23457E+11.
_SHORT_ID = re.compile(r"[-+]?\d(?:\.(\d+))?E\+(\d+)")
_WHOLE_LABEL = re.compile(r"(-?(?:0|[1-9]\d*))(?:\.0+)?")
_YEAR = re.compile(r"\d{4}")
_MONTH = re.compile(r"(\d{4})[-/.](\d{1,2})")
_EPOCH = re.compile(r"-\d+(\.\d*)?|[-+]?(\d{9,}(\.\d*)?|\d(\.\d+)?[eE]\+\d+)")
# Seconds reach 1e11 in the year 5138. Milliseconds reach 1e11, microseconds 1e14 and nanoseconds 1e17 in 1973.
_UNITS = ((1e17, 1e9), (1e14, 1e6), (1e11, 1e3))
# 20240131120000 is a date in a log or data warehouse; as milliseconds, these would be in the years 2572 to 2635.
_DATED = (19000101000000, 21001231235959)
_FIRST, _LAST = -62_135_596_800.0, 253_402_300_800.0
"""Epoch seconds of the years 1 to 9999; the end is exclusive."""

_PRINTED_NULLS = frozenset({"nan", "NaN", "NaT", "None", "<NA>", "null", "NULL", "undefined"})
_WRITTEN_NULLS = _PRINTED_NULLS | {"NA", "N/A", "#N/A", r"\N"}
# Direction marks, zero-width spaces, byte order marks and soft hyphens; joiners shape emoji and letters, so they count.
_INVISIBLE = re.compile("[\u00ad\u061c\u200b\u200e\u200f\u202a-\u202e\u2060\u2066-\u2069\ufeff]")
_SPACE = re.compile("[\u00a0\u2000-\u200a\u202f\u205f\u3000]")


@dataclass(frozen=True, slots=True)
class Unreadable:
    """Placeholder in a cell for a value that Python cannot represent; `what` describes it in a few words."""

    what: str


class Rounded(float):
    """A float32 or float16 value too large to identify one whole number."""


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
        raise ValueError("bytes, expected text")
    if isinstance(value, Unreadable):
        raise ValueError(value.what)
    if isinstance(value, list | tuple):
        return ", ".join(plain(each) for each in value)
    if isinstance(value, dict):
        return json.dumps(value, ensure_ascii=False, default=plain)
    if isinstance(value, date | datetime):
        return value.isoformat()
    return str(value)


def identifier(value: object) -> str | None:
    """Convert an id to text: a whole number as its digits (7.0 is "7"), None for null and NaN.

    Floats are accepted because formats without a null for integers turn ids into floats.

    Raises:
        ValueError: the value is not an id, or is a float that stands for several whole numbers.
    """
    if value is None or isinstance(value, str):
        return value
    if isinstance(value, bool | list | tuple | dict | bytes):
        raise ValueError(f"a {type(value).__name__}, expected text or a number")
    if not isinstance(value, float | Decimal):
        return plain(value)
    if isinstance(value, float) and math.isnan(value):
        return None
    if not math.isfinite(value) or value != int(value):
        raise ValueError(f"{value} is not a whole number; write the id as text")
    if isinstance(value, float) and (abs(value) >= _EXACT or isinstance(value, Rounded)):
        raise ValueError(f"{value}: the id has lost digits; write it as text")
    return str(int(value))


def written_id(value: object) -> object:
    """Return the value of an untyped cell: a float if the text is a whole number in float notation, else unchanged."""
    if not isinstance(value, str) or not _FLOAT_ID.fullmatch(value):
        return value
    short = _SHORT_ID.fullmatch(value)
    return Rounded(value) if short and len(short[1] or "") < int(short[2]) else float(value)


def is_written_null(text: str | None, typed: bool = True) -> bool:
    """Return whether an id is the text that programs write for a missing value: "nan", "None", without types "NA" too.

    Such an id is not one user's or one item's: every row whose id is missing has it.
    """
    return text in (_PRINTED_NULLS if typed else _WRITTEN_NULLS)


def parse_time(value: object) -> float:
    """Return epoch seconds for ISO text (year, month, day or more), a number, a date or a datetime.

    Numbers with an absolute value above 1e11 are milliseconds, above 1e14 microseconds, above 1e17 nanoseconds, but
    20240131120000 is noon of 31 January 2024. A time without a zone is UTC. Text of nine or more digits, or with a
    minus sign in front, is a number.

    Raises:
        ValueError: the value is none of these; the message is a few words.
    """
    if isinstance(value, str):
        return _from_text(value.strip())
    if isinstance(value, bool):
        raise ValueError(f"{value} is not a time")
    if isinstance(value, int | float | Decimal):
        return _from_number(value)
    if isinstance(value, datetime):
        return _from_datetime(value)
    if isinstance(value, date):
        return _from_datetime(datetime(value.year, value.month, value.day))
    if isinstance(value, Unreadable):
        raise ValueError(value.what)
    raise ValueError(f"a {type(value).__name__} is not a time")


def _from_text(text: str) -> float:
    try:
        if _YEAR.fullmatch(text):
            return _from_datetime(datetime(int(text), 1, 1))
        if month := _MONTH.fullmatch(text):
            return _from_datetime(datetime(int(month[1]), int(month[2]), 1))
        if _EPOCH.fullmatch(text):
            return _from_number(float(text))
        return _from_datetime(datetime.fromisoformat(text.removesuffix(" UTC")))  # as BigQuery writes it
    except (ValueError, OverflowError):
        raise ValueError(f"{shortened(text)!r} is not a time") from None


def _from_number(number: float | Decimal) -> float:
    try:
        seconds = float(number)
    except OverflowError:
        seconds = math.inf
    if not math.isfinite(seconds):
        raise ValueError(f"{'NaN' if math.isnan(seconds) else 'infinity'} is not a time")
    if _DATED[0] <= seconds <= _DATED[1]:
        digits = f"{seconds:.0f}"
        return _from_text(f"{digits[:8]}T{digits[8:]}")
    return _in_range(seconds / next((unit for above, unit in _UNITS if abs(seconds) > above), 1.0))


def _from_datetime(moment: datetime) -> float:
    return _in_range((moment if moment.tzinfo else moment.replace(tzinfo=UTC)).timestamp())


def _in_range(seconds: float) -> float:
    # A time outside of this range could be sorted, but not shown as a date.
    if not _FIRST <= seconds < _LAST:
        raise ValueError(OUT_OF_RANGE)
    return seconds


def label_key(text: str, kind: str) -> float | str | None:
    """Return a value that is equal for two spellings of one label; None for a rating that is not a number.

    A rating is any number below 2**53 in size. Two classes are one if they look the same, up to the kind of spaces and
    accents, or are one whole number as columns of integers, floats and decimals spell it: "1.10" and "1.1" may be two
    chapters, and "007" is not "7".
    """
    if kind == "rating":
        return rating_of(text)
    if not text.isascii():
        text = _SPACE.sub(" ", unicodedata.normalize("NFC", _INVISIBLE.sub("", text))).strip()
    found = _WHOLE_LABEL.fullmatch(text)
    return found[1] if found else text


def rating_of(text: str) -> float | None:
    """Return a rating as a float; None if it is not a number, or 2**53 or more in size."""
    try:
        number = float(text)
    except ValueError:
        return None
    if "_" in text:  # a digit separator in Python's own numbers
        return None
    return number if abs(number) < _EXACT else None


def no_rating(text: str) -> str:
    """Return, for messages, what a text is of which `rating_of` makes nothing."""
    try:
        large = math.isfinite(float(text)) and "_" not in text
    except ValueError:
        large = False
    return "not a number below 2**53 in size" if large else "not a number"


def find_label(text: str, labels: Sequence[str], kind: str) -> str | None:
    """Return the label equal to `text`, as a string or by `label_key`; None if there is none."""
    if text in labels:
        return text
    key = label_key(text, kind)
    return None if key is None else next((each for each in labels if label_key(each, kind) == key), None)


def respelled(texts: Iterable[str], kind: str) -> dict[str, str]:
    """Map each text to the shortest spelling of the same label among `texts`; unchanged texts are left out."""
    keys = {text: key for text in texts if (key := label_key(text, kind)) is not None}
    shortest: dict[float | str, str] = {}
    for text, key in sorted(keys.items(), key=lambda pair: (len(pair[0]), pair[0])):
        shortest.setdefault(key, text)
    return {text: shortest[key] for text, key in keys.items() if shortest[key] != text}
