"""Numeric labels in different spellings: "3" and "3.0" are one label.

A column of integers with a missing value becomes a column of floats, so both spellings occur in one dataset.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Sequence

_WHOLE = re.compile(r"(-?(?:0|[1-9]\d*))(?:\.0+)?")


def number_of(text: str, kind: str) -> float | str | None:
    """Return a value that is equal for two spellings of one number; None for a text that is not a number.

    A rating is any finite number. A class is a whole number as columns of integers, floats and decimals spell it:
    "1.10" and "1.1" may be two chapters, and "007" is not "7".
    """
    if kind == "rating":
        return rating_of(text)
    found = _WHOLE.fullmatch(text)
    return found[1] if found else None


def rating_of(text: str) -> float | None:
    """Return a rating as a float; None if it is not a finite number."""
    try:
        number = float(text)
    except ValueError:
        return None
    return number if math.isfinite(number) else None


def find_label(text: str, labels: Sequence[str], kind: str) -> str | None:
    """Return the label equal to `text`, as a string or as a number; None if there is none."""
    if text in labels:
        return text
    number = number_of(text, kind)
    return None if number is None else next((each for each in labels if number_of(each, kind) == number), None)


def respelled(texts: Iterable[str], kind: str) -> dict[str, str]:
    """Map each text to the shortest spelling of the same number among `texts`; unchanged texts are left out."""
    numbers = {text: number for text in texts if (number := number_of(text, kind)) is not None}
    shortest: dict[float | str, str] = {}
    for text, number in sorted(numbers.items(), key=lambda pair: (len(pair[0]), pair[0])):
        shortest.setdefault(number, text)
    return {text: shortest[number] for text, number in numbers.items() if shortest[number] != text}
