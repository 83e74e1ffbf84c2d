"""Measures of an answer's style: prefix, first letter's case, length and final punctuation.

Two kinds of measure for tasks with free text. A *match* compares an answer with the true answer of its query, so it is
a number per query, as ROUGE is. A *distance* compares the distribution of a user's answers with that of the answers in
the user's own history: total variation for prefix, case and punctuation, the difference of the means for the length.
The true answers of few queries are at some distance too, so distances compare methods on the same queries only.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean
from types import MappingProxyType

from proper.data.dataset import Dataset
from proper.data.words import word_starts

_PREFIX = re.compile(r"([^\s:]{1,40}):(?=\s|$)")
_MARKS = ".?!…。？！"


def prefix(text: str) -> str:
    """Return the first token without its colon if it ends with one, as in `refs: pack tighter`; else ""."""
    found = _PREFIX.match(text.strip())
    return found[1] if found else ""


def case(text: str) -> str:
    """Return whether the first letter is `upper` or `lower`; "" if there is no letter, or its script has no case."""
    first = next((letter for letter in text if letter.isalpha()), "")
    return "upper" if first.isupper() else "lower" if first.islower() else ""


def length(text: str) -> int:
    """Return the number of words; in scripts without spaces, of letters."""
    return len(word_starts(text))


def punctuation(text: str) -> str:
    """Return the mark that ends the last sentence; "" if there is none."""
    last = text.strip()[-1:]
    return last if last in _MARKS else ""


def length_match(target: str, answer: str) -> float:
    """Return the shorter length as a share of the longer one, in words; 1 if both are empty."""
    short, long = sorted((length(target), length(answer)))
    return short / long if long else 1.0


def _equal(feature: Callable[[str], str]) -> Callable[[str, str], float]:
    return lambda target, answer: float(feature(target) == feature(answer))


_PARTS: Mapping[str, Callable[[str, str], float]] = MappingProxyType(
    {
        "style_prefix": _equal(prefix),
        "style_case": _equal(case),
        "style_length": length_match,
        "style_punctuation": _equal(punctuation),
    }
)

MATCHES: Mapping[str, Callable[[str, str], float]] = MappingProxyType(
    {**_PARTS, "style_match": lambda target, answer: fmean(part(target, answer) for part in _PARTS.values())}
)
"""Matches by metric, each from 0 to 1 for (true answer, answer); `style_match` is the mean of the four others."""

DISTANCE, LENGTH_GAP = "style_distance", "style_length_gap"


def _has_prefix(text: str) -> str:
    return "prefix" if prefix(text) else ""


_HABITS = (_has_prefix, case, punctuation)


@dataclass(frozen=True)
class Habits:
    """Distributions of an author's answers.

    Attributes:
        shares: for prefix (whether there is one), case and punctuation, the share of each value.
        words: mean length in words.
    """

    shares: tuple[Mapping[str, float], ...]
    words: float


def habits_of(answers: Sequence[str]) -> Habits:
    """Return the habits in some answers, at least one."""
    counts = [Counter(map(feature, answers)) for feature in _HABITS]
    shares = tuple({value: count / len(answers) for value, count in each.items()} for each in counts)
    return Habits(shares, fmean(map(length, answers)))


def user_habits(dataset: Dataset, kind: str) -> dict[str, Habits]:
    """Return the habits of every target user with a history by user id; empty for a kind of task with labels."""
    if kind != "generation":
        return {}
    users = [user.id for user in dataset.users("target") if user.history]
    return {user: habits_of([item.target for item in dataset.history(user)]) for user in users}


def distances(own: Habits, answers: Habits) -> dict[str, float]:
    """Return the distance of answers from the author's own, by metric.

    `style_distance` is the mean total variation of prefix, case and punctuation, from 0 to 1; `style_length_gap` the
    difference of the mean lengths in words.
    """
    variations = [_total_variation(*pair) for pair in zip(own.shares, answers.shares, strict=True)]
    return {DISTANCE: fmean(variations), LENGTH_GAP: abs(own.words - answers.words)}


def _total_variation(one: Mapping[str, float], other: Mapping[str, float]) -> float:
    return sum(abs(one.get(value, 0.0) - other.get(value, 0.0)) for value in {*one, *other}) / 2
