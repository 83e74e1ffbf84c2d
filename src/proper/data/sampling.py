"""Training samples: all history rows or a token budget spread evenly over users, in seeded order.

Order and choice come from hashes inside SQL, so only ids are sorted and rows stream.
"""

from __future__ import annotations

import sqlite3
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal, Protocol

from proper.data.database import salt

Who = Literal["all", "others", "targets"]

_CHUNK = 1000


@dataclass(frozen=True, slots=True)
class TextExample:
    """One interaction. `tokens` counts prompt and target in backbone tokens, untruncated; `time` is epoch seconds."""

    id: int
    user: str
    prompt: str
    target: str
    item: str | None
    time: float | None
    tokens: int


EXAMPLES = """
    SELECT r.id, u.id, t.prompt, t.target, t.item, r.time, r.tokens
    FROM rows r CROSS JOIN users u ON u.number = r.user CROSS JOIN texts t ON t.id = r.text"""


class SampledRows(Protocol):
    """Rows to train on: `size` rows with `tokens` tokens in all, in a different order in every epoch."""

    @property
    def size(self) -> int: ...  # noqa: D102
    @property
    def tokens(self) -> int: ...  # noqa: D102
    def rows(self, epoch: int) -> Iterator[TextExample]: ...  # noqa: D102


@dataclass(frozen=True)
class Sample:
    """`size` history rows with `tokens` tokens in all; a row counts at most the model's maximum length."""

    connection: sqlite3.Connection
    table: str
    seed: int
    size: int
    tokens: int

    def rows(self, epoch: int) -> Iterator[TextExample]:
        """Yield every row once, in an order that depends only on the sample's seed and `epoch`."""
        ordered = self.connection.execute(
            f"""SELECT s.id FROM {self.table} s CROSS JOIN rows r ON r.id = s.id
            ORDER BY scramble(r.digest, ?), s.id""",
            (salt("epoch", self.seed, epoch),),
        )
        while ids := [identity for (identity,) in ordered.fetchmany(_CHUNK)]:
            places = ", ".join("?" * len(ids))
            found = {row[0]: row for row in self.connection.execute(f"{EXAMPLES} WHERE r.id IN ({places})", ids)}
            for identity in ids:
                yield TextExample(*found[identity])


def draw(
    connection: sqlite3.Connection, who: Who, max_tokens: int | None, seed: int, max_length: int, table: str
) -> Sample:
    """Sample history rows of `who` into the new temporary table `table`.

    With `max_tokens`, rows are taken in rounds of one row per user, users in random order in each round, until the next
    row would exceed the budget; at least one row is taken.
    """
    roles = {"all": "('target', 'other')", "others": "('other')", "targets": "('target')"}[who]
    history = f"""
        FROM rows r JOIN users u ON u.number = r.user WHERE r.part = 'history' AND u.role IN {roles}"""
    connection.execute(f"CREATE TEMP TABLE {table}(id INTEGER PRIMARY KEY, tokens INTEGER)")
    if max_tokens is None:
        connection.execute(f"INSERT INTO {table} SELECT r.id, min(r.tokens, {max_length}) {history} ORDER BY r.id")
    else:
        connection.execute(
            f"""
            INSERT INTO {table}
            SELECT id, tokens FROM (
                SELECT id, tokens, sum(tokens) OVER spent AS used, row_number() OVER spent AS place FROM (
                    SELECT r.id, min(r.tokens, {max_length}) AS tokens, u.id AS name,
                           row_number() OVER (PARTITION BY r.user ORDER BY scramble(r.digest, :salt), r.id) AS round
                    {history})
                WINDOW spent AS (ORDER BY round, scramble(name || ' ' || round, :salt), id
                                 ROWS UNBOUNDED PRECEDING))
            WHERE used <= :budget OR place = 1 ORDER BY id""",
            {"salt": salt("sample", seed), "budget": max_tokens},
        )
    size, tokens = connection.execute(f"SELECT count(*), coalesce(sum(tokens), 0) FROM {table}").fetchone()
    return Sample(connection, table, seed, size, tokens)
