"""Conversion of LaMP profiles and questions to rows, shared by the readers of the official and OPPU's files.

Each profile item becomes a history row; each question becomes a query later than the whole profile.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Any

from proper.config.lamp_tasks import LampTask, Layout
from proper.data.database import text_key
from proper.data.lamp.prompts import Wording, question_fields, wording
from proper.data.rows import BadValue
from proper.data.values import identifier, parse_time, plain

Row = dict[str, Any]

QUERY = "query"
"""The column that marks a row as a query."""

_SECOND = 1.0
_SHARE_SHOWN = 0.2
"""Share of a tweet's words given as its beginning; the benchmark's authors draw it from .1 to .25."""

_POOL = 256
_TWITTER = re.compile(
    r"[A-Z][a-z]{2} ([A-Z][a-z]{2}) (\d{1,2}) (\d{2}):(\d{2}):(\d{2}) (?:([A-Z]{3,4}|[+-]\d{4}) )?(\d{4})"
)
_MONTHS = ("Jan", "Feb", "Mar", "Apr", "May", "Jun", "Jul", "Aug", "Sep", "Oct", "Nov", "Dec")
_HOURS = {"PDT": -7, "PST": -8, "EDT": -4, "EST": -5}


@dataclass(frozen=True, slots=True)
class Question:
    """A question of a user with its true answer; `query` is true for a test query, false for history."""

    id: str
    text: str
    answer: object
    query: bool
    date: object = None


@dataclass(frozen=True)
class RowMaker:
    """Converter from users to rows of one task.

    `others` are (user, title) pairs of papers from which LaMP-1's wrong references are drawn, see `paper_titles`.
    """

    task: LampTask
    words: Wording
    others: Sequence[tuple[str, str]] = ()

    @property
    def columns(self) -> tuple[str, ...]:
        """Columns of every row: ids, time, the finished prompt and answer, and the fields for custom templates."""
        fields = ("title", "option1", "option2") if self.task.name == "lamp-1" else (self.task.source,)
        target = () if self.task.name == "lamp-1" else (self.task.target,)
        return ("user_id", "item_id", "timestamp", "input", "output", *fields, *target, QUERY)

    def rows(self, user: str, profile: object, questions: Iterable[Question]) -> Iterator[Row | str]:
        """Yield a user's rows, history first; a bad row yields an error text in its place."""
        if not isinstance(profile, list):
            yield "profile: missing, or no list"
            return
        newest: float | None = None
        for row in self._history(user, profile):
            if not isinstance(row, str) and row["timestamp"] is not None:
                newest = row["timestamp"] if newest is None else max(newest, row["timestamp"])
            yield row
        for question in questions:
            try:
                yield self._question(user, question, newest)
            except BadValue as error:
                yield f"question '{question.id}': {error}"

    def _history(self, user: str, profile: Sequence[object]) -> Iterator[Row | str]:
        titles = [_title(item) for item in profile] if self.task.name == "lamp-1" else []
        for index, item in enumerate(profile):
            try:
                if not isinstance(item, dict):
                    raise BadValue("item", "no object")
                fields = self._choice(user, item, index, titles) if titles else self._fields(item)
                # Item ids are unique only within a user, so the user id is prefixed.
                own_id = _own_id(item)
                item_id = f"{user}/#{index}" if own_id is None else f"{user}/{own_id}"
                yield {
                    **fields,
                    "user_id": user,
                    "item_id": item_id,
                    "timestamp": moment(item.get("date")),
                    "input": self.words.item(fields),
                    "output": fields[self.task.target],
                    QUERY: False,
                }
            except BadValue as error:
                yield f"profile[{index}].{error}"

    def _question(self, user: str, question: Question, newest: float | None) -> Row:
        fields = question_fields(self.task, question.text)
        asked = moment(question.date)
        if asked is None and newest is not None:
            # An undated question refers to the whole profile, so it is dated after its newest item.
            asked = newest + _SECOND
        answer = self._answer(_text({"answer": question.answer}, "answer"))
        return {
            **fields,
            self.task.target: answer,
            "user_id": user,
            "item_id": question.id,
            "timestamp": asked,
            "input": self.words.question(fields, question.text),
            "output": answer,
            QUERY: question.query,
        }

    def _fields(self, item: Mapping[str, object]) -> dict[str, str]:
        answer = self._answer(_text(item, self.task.target))
        if self.task.name == "lamp-7":
            words = answer.split()
            shown = int(_SHARE_SHOWN * len(words))
            source = " ".join(words[:shown])
            # Only the official layout shows the beginning, and then the target is the rest.
            rest = " ".join(words[shown:]) if self.words.layout == "official" else answer
            return {"source": source, "text": rest}
        return {self.task.source: _text(item, self.task.source), self.task.target: answer}

    def _answer(self, text: str) -> str:
        """Return the label that equals an answer up to case, spaces or brackets; else the stripped answer."""
        text = text.strip()
        if self.task.kind != "classification":
            return text
        if self.task.name == "lamp-1" and text.strip("[]") in ("1", "2"):
            return f"[{text.strip('[]')}]"
        folded = " ".join(text.casefold().split())
        return folded if folded in self.task.labels else text

    def _choice(self, user: str, item: Mapping[str, object], index: int, titles: Sequence[str]) -> dict[str, str]:
        """Turn a paper into a choice between a reference of its author and a paper of another author.

        OPPU's items have a citation. The official items have none: there the author's preceding paper in the profile
        replaces it. The order of the options is a fair coin from a hash; in OPPU the answer is always the first.
        """
        title = _text(item, "title")
        coin = text_key(f"{user}\n{title}")
        neighbours = [*reversed(titles[:index]), *titles[index + 1 :]]
        related = _citations(item.get("citation")) or [other for other in neighbours if other and other != title][:1]
        if not related:
            raise BadValue("citation", "missing, and the author has no other paper to replace it")
        own = {_norm(text) for text in (*titles, *related)}
        other_papers = [paper for author, paper in self.others if author != user and _norm(paper) not in own]
        if not other_papers:
            raise BadValue("citation", "there is no other author's paper to choose against")
        options = [related[(coin >> 1) % len(related)], other_papers[(coin >> 17) % len(other_papers)]]
        first = coin & 1
        return {
            "title": title,
            "option1": options[first],
            "option2": options[1 - first],
            self.task.target: "[2]" if first else "[1]",
        }


def row_maker(task: LampTask, layout: Layout, others: Sequence[tuple[str, str]] = ()) -> RowMaker:
    """Return the converter from users to rows of `task` with the prompts of `layout`."""
    return RowMaker(task, wording(task, layout), others)


def paper_titles(users: Iterable[tuple[str, object]]) -> list[tuple[str, str]]:
    """Return (user, title) of papers of the first users, in rounds of one paper per user, at most 256."""
    found: list[list[tuple[str, str]]] = []
    for user, profile in users:
        items = profile if isinstance(profile, list) else []
        found.append([(user, title) for title in map(_title, items[:8]) if title])
        if len(found) >= _POOL:
            break
    rounds = max(map(len, found), default=0)
    return [titles[turn] for turn in range(rounds) for titles in found if turn < len(titles)][:_POOL]


def moment(value: object) -> float | None:
    """Return epoch seconds for a date in the formats of these files; None for a missing date.

    A whole number may be a year (2012) or a day (20120131), which `parse_time` would read as seconds; tweets have
    "Mon Apr 06 22:19:45 PDT 2009".

    Raises:
        BadValue: the value is not a date.
    """
    if value is None or (isinstance(value, str) and not value.strip()):
        return None
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    if isinstance(value, int) and not isinstance(value, bool) and len(str(value)) in (4, 8):
        value = str(value)
    try:
        tweeted = _TWITTER.fullmatch(value.strip()) if isinstance(value, str) else None
        return parse_time(_from_tweet(tweeted) if tweeted else value)
    except ValueError as error:
        raise BadValue("date", str(error)) from None


def _from_tweet(found: re.Match[str]) -> datetime:
    month, day, hour, minute, second, zone, year = found.groups()
    if month not in _MONTHS:
        raise ValueError(f"{found[0]!r} is not a time")
    local = datetime(int(year), _MONTHS.index(month) + 1, int(day), int(hour), int(minute), int(second), tzinfo=UTC)
    ahead = int(zone[:3]) if zone and zone[0] in "+-" else _HOURS.get(zone or "", 0)
    return local - timedelta(hours=ahead)


def _text(item: Mapping[str, object], field: str) -> str:
    if field not in item:
        raise BadValue(field, "missing")
    try:
        return plain(item[field])
    except ValueError as error:
        raise BadValue(field, str(error)) from None


def _own_id(item: Mapping[str, object]) -> str | None:
    try:
        return identifier(item.get("id"))
    except ValueError as error:
        raise BadValue("id", str(error)) from None


def _title(item: object) -> str:
    title = item.get("title") if isinstance(item, dict) else None
    return title.strip() if isinstance(title, str) else ""


def _citations(value: object) -> list[str]:
    """Return the titles in OPPU's `citation`, which is one title or a list of titles."""
    found = value if isinstance(value, list) else [value]
    return [text.strip() for text in found if isinstance(text, str) and text.strip()]


def _norm(text: str) -> str:
    return " ".join(text.casefold().split())
