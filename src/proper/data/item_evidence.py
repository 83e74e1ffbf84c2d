"""Item evidence: other users' answers for the same item, as columns that the prompt's template can name.

    {item_mean}    ratings: mean of the other users' ratings, with one decimal
    {item_usual}   labels: the other users' most frequent label
    {item_count}   how many other users' rows these are

Only history rows count, never a query, a row that was left out, or a row of the same user. An item that no other user
has in the history gets "unknown" and a count of 0. The data files need no such columns; if they have them, the
files' columns are used.

Texts are written before the split is known, with a marker in place of each column; `fill_item_evidence` replaces the
markers afterwards. Hashes of rows and inputs keep the markers, so they do not depend on others' answers.
"""

from __future__ import annotations

import logging
import sqlite3
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from decimal import Decimal
from itertools import groupby

from proper.config import Config
from proper.data.database import get_meta
from proper.data.histories import CountTokens
from proper.data.rows import Template, parse_template
from proper.errors import DataError

logger = logging.getLogger(__name__)

MEAN, USUAL, COUNT = "item_mean", "item_usual", "item_count"
COLUMNS = (MEAN, USUAL, COUNT)
NEUTRAL: Mapping[str, str] = {MEAN: "unknown", USUAL: "unknown", COUNT: "0"}

_MARKS: Mapping[str, str] = {name: f"\x1a{name}\x1a" for name in COLUMNS}
_CHUNK = 1000


@dataclass(frozen=True, slots=True)
class ItemAnswers:
    """The history's answers for one item: in all, and by user."""

    kind: str
    every: Counter[str]
    by_user: Mapping[int, Counter[str]]

    @classmethod
    def of(cls, kind: str, answers: Iterable[tuple[int, str]]) -> ItemAnswers:
        """Count (user, answer) pairs."""
        by_user: dict[int, Counter[str]] = {}
        for user, answer in answers:
            by_user.setdefault(user, Counter())[answer] += 1
        return cls(kind, sum(by_user.values(), Counter()), by_user)

    def without(self, user: int) -> dict[str, str]:
        """Return the texts of the columns for a row of `user`."""
        others = self.every - self.by_user.get(user, Counter())
        if not others:
            return dict(NEUTRAL)
        found = {**NEUTRAL, COUNT: str(others.total())}
        if self.kind == "rating":
            mean = sum((Decimal(rating) * count for rating, count in others.items()), Decimal()) / others.total()
            return {**found, MEAN: f"{mean:.1f}"}
        most = max(others.values())
        return {**found, USUAL: min(label for label, count in others.items() if count == most)}


def marked(template: Template) -> Template:
    """Return the template with markers for columns of item evidence that a row does not have."""
    return _with_defaults(template, _MARKS)


def neutral(template: Template) -> Template:
    """Return the template with neutral texts for columns of item evidence that are not given."""
    return _with_defaults(template, NEUTRAL)


def _with_defaults(template: Template, texts: Mapping[str, str]) -> Template:
    return replace(template, defaults={name: texts[name] for name in COLUMNS if name in template.columns})


_BRACED = tuple(f"{{{name}}}" for name in COLUMNS)


def fill_item_evidence(connection: sqlite3.Connection, config: Config, count_tokens: CountTokens) -> None:
    """Replace the markers in all prompts, and count their tokens again; do nothing if there are none.

    Raises:
        DataError: a column does not go with the task, no column of items is configured, or no row has an item.
    """
    missing = _missing_columns(connection, config)
    if not missing:
        return
    connection.execute("CREATE TEMP TABLE evidence(id INTEGER PRIMARY KEY, mean TEXT, usual TEXT, count TEXT)")
    connection.executemany("INSERT INTO evidence VALUES (?, ?, ?, ?)", _evidence(connection, config.task.kind))
    _warn_of_unknown_queries(connection, missing[0], config)
    _replace_markers(connection, count_tokens)
    connection.execute("DROP TABLE evidence")


def _missing_columns(connection: sqlite3.Connection, config: Config) -> list[str]:
    """Return the columns of item evidence that the prompt names and that some row does not have itself.

    Raises:
        DataError: as `fill_item_evidence`.
    """
    if config.tasks and any(mark in one.data.prompt for one in config.each_task.values() for mark in _BRACED):
        raise DataError(f"data.prompt: {', '.join(_BRACED)} need a run of one task")
    columns = parse_template(config.data.prompt, "data.prompt").columns
    missing = [name for name in COLUMNS if name in columns and _is_marked(connection, name)]
    wrong = {"rating": USUAL, "classification": MEAN}.get(config.task.kind)
    for name in missing:
        if config.task.kind == "generation" or name == wrong:
            raise DataError(f"data.prompt: '{{{name}}}' does not go with task.kind {config.task.kind}")
        if config.data.item is None:
            raise DataError(f"data.prompt: '{{{name}}}' needs data.item, the column of the items' ids")
        if not connection.execute("SELECT 1 FROM rows WHERE item_key IS NOT NULL LIMIT 1").fetchone():
            raise DataError(
                f"data.prompt: '{{{name}}}' needs items, and no row has one in column '{config.data.item}' (data.item)"
            )
    return missing


def _replace_markers(connection: sqlite3.Connection, count_tokens: CountTokens) -> None:
    """Replace the markers in all prompts by the evidence, and count the rows' tokens again."""
    last = 0
    while rows := connection.execute(
        """SELECT r.id, r.text, t.prompt, t.target, e.mean, e.usual, e.count
        FROM rows r CROSS JOIN texts t ON t.id = r.text LEFT JOIN evidence e ON e.id = r.id
        WHERE r.id > ? ORDER BY r.id LIMIT ?""",
        (last, _CHUNK),
    ).fetchall():
        prompts = [_replaced(prompt, dict(zip(COLUMNS, found, strict=True))) for _, _, prompt, _, *found in rows]
        tokens = count_tokens(prompts, [row[3] for row in rows])
        texts = [row[1] for row in rows]
        connection.executemany("UPDATE texts SET prompt = ? WHERE id = ?", zip(prompts, texts, strict=True))
        ids = [row[0] for row in rows]
        connection.executemany("UPDATE rows SET tokens = ? WHERE id = ?", zip(tokens, ids, strict=True))
        last = ids[-1]


def _warn_of_unknown_queries(connection: sqlite3.Connection, name: str, config: Config) -> None:
    """Warn if no query has evidence, as where the split keeps the queries' items out of all histories."""
    known = "SELECT 1 FROM rows r JOIN evidence e ON e.id = r.id WHERE r.part = 'query' AND e.count <> '0' LIMIT 1"
    if not connection.execute(known).fetchone():
        logger.warning(
            f"data.prompt: '{{{name}}}' is unknown in every query, since no other user's history has an item of a "
            f"query (split.by: {config.split.by}, split.shared_items: {get_meta(connection, 'shared_items')})"
        )


def _is_marked(connection: sqlite3.Connection, name: str) -> bool:
    """Whether a row has no such column of its own."""
    return bool(connection.execute("SELECT 1 FROM texts WHERE instr(prompt, ?) LIMIT 1", (_MARKS[name],)).fetchone())


def _evidence(connection: sqlite3.Connection, kind: str) -> Iterator[tuple[int, str, str, str]]:
    """Yield (row, mean, usual, count) for every row with an item, item by item."""
    rows = connection.execute(
        """SELECT r.item_key, r.id, r.user, r.part, t.target FROM rows r CROSS JOIN texts t ON t.id = r.text
        WHERE r.item_key IS NOT NULL ORDER BY r.item_key, r.id"""
    )
    for _, group in groupby(rows, key=lambda row: int(row[0])):
        item = list(group)
        answers = ItemAnswers.of(kind, ((user, target) for _, _, user, part, target in item if part == "history"))
        for _, row, user, _, _ in item:
            found = answers.without(user)
            yield row, found[MEAN], found[USUAL], found[COUNT]


def _replaced(prompt: str, found: Mapping[str, str | None]) -> str:
    for name, mark in _MARKS.items():
        prompt = prompt.replace(mark, found[name] or NEUTRAL[name])
    return prompt
