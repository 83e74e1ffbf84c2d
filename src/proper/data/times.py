"""Timestamp parsing: ISO text, numbers, dates and datetimes to epoch seconds, UTC."""

from __future__ import annotations

import math
import re
from datetime import UTC, date, datetime

from proper.data.templates import Unreadable

_YEAR = re.compile(r"\d{4}")
_MONTH = re.compile(r"(\d{4})[-/.](\d{1,2})")
_NUMBER = re.compile(r"[-+]?(\d{9,}(\.\d*)?|\d(\.\d+)?[eE]\+\d+)")
# Seconds reach 1e11 in the year 5138. Milliseconds reach 1e11, microseconds 1e14 and nanoseconds 1e17 in 1973.
_UNITS = ((1e17, 1e9), (1e14, 1e6), (1e11, 1e3))
_FIRST, _LAST = -62_135_596_800.0, 253_402_300_800.0
"""Epoch seconds of the years 1 to 9999; the end is exclusive."""

OUT_OF_RANGE = "a time outside of the years 1 to 9999"


def parse_time(value: object) -> float:
    """Return epoch seconds for ISO text (year, month, day or more), a number, a date or a datetime.

    Numbers with an absolute value above 1e11 are milliseconds, above 1e14 microseconds, above 1e17 nanoseconds. A time
    without a zone is UTC. Text of nine or more digits is a number.

    Raises:
        ValueError: the value is none of these; the message is a few words.
    """
    if isinstance(value, str):
        return _from_text(value.strip())
    if isinstance(value, bool):
        raise ValueError(f"{value} is not a time")
    if isinstance(value, int | float):
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
        if _NUMBER.fullmatch(text):
            return _from_number(float(text))
        return _from_datetime(datetime.fromisoformat(text))
    except (ValueError, OverflowError):
        shown = text if len(text) <= 40 else text[:40] + "..."
        raise ValueError(f"{shown!r} is not a time") from None


def _from_number(number: float) -> float:
    try:
        seconds = float(number)
    except OverflowError:
        seconds = math.inf
    if not math.isfinite(seconds):
        raise ValueError(f"{'NaN' if math.isnan(seconds) else 'infinity'} is not a time")
    return _in_range(seconds / next((unit for above, unit in _UNITS if abs(seconds) > above), 1.0))


def _from_datetime(moment: datetime) -> float:
    return _in_range((moment if moment.tzinfo else moment.replace(tzinfo=UTC)).timestamp())


def _in_range(seconds: float) -> float:
    # A time outside of this range could be sorted, but not shown as a date.
    if not _FIRST <= seconds < _LAST:
        raise ValueError(OUT_OF_RANGE)
    return seconds
