"""One sortable number for every way in which data writes a time: seconds since 1970, UTC.

Knows nothing about rows or files.
"""

from __future__ import annotations

import math
import re
from datetime import UTC, date, datetime

_YEAR = re.compile(r"\d{4}")
_MONTH = re.compile(r"(\d{4})[-/.](\d{1,2})")
_NUMBER = re.compile(r"[-+]?\d{9,}(\.\d*)?")
# Seconds reach 1e11 in the year 5138, milliseconds in 1973.
_MILLISECONDS_ABOVE = 1e11


def parse_time(value: object) -> float:
    """Return epoch seconds for ISO text (year, month, day or more), a number, a date or a datetime.

    Numbers above 1e11 are milliseconds. A time without a zone is UTC. Text of nine or more digits is a number.

    Raises:
        ValueError: it is none of these; the message is a few words.
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
    return seconds / 1000 if seconds > _MILLISECONDS_ABOVE else seconds


def _from_datetime(moment: datetime) -> float:
    return (moment if moment.tzinfo else moment.replace(tzinfo=UTC)).timestamp()
