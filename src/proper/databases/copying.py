"""Copy of all rows of a database into another one, of the same or another engine, compared by counts and checksums."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from hashlib import blake2b
from typing import Any

from sqlalchemy import MetaData, Table, bindparam, select, tuple_

from proper.databases.shared import SharedDatabase
from proper.databases.statements import Statement, row_of
from proper.errors import StoreError

_PAGE = 1000
_MODULUS = 1 << 128


@dataclass
class _Digest:
    """Number of rows, and the sum of their hashes: engines order texts differently."""

    rows: int = 0
    total: int = 0

    def add(self, page: Iterable[Any]) -> None:
        for row in page:
            self.rows += 1
            hashed = blake2b(repr(tuple(row)).encode(), digest_size=16).digest()
            self.total = (self.total + int.from_bytes(hashed, "big")) % _MODULUS


def copy_tables(
    source: SharedDatabase,
    target: SharedDatabase,
    tables: MetaData,
    advance: Callable[[int], None] = lambda count: None,
) -> int:
    """Copy every row of these tables into the empty ones of `target`, inside a transaction; return how many.

    Each table is read back and compared. Generated numbers go on after the last one that `source` gave out.

    Raises:
        InputError: `target` cannot hold a text: PostgreSQL has no character NUL.
        StoreError: the copy differs, or cannot be written.
    """
    count = 0
    for table in tables.sorted_tables:
        written, found, added = _Digest(), _Digest(), _insert(table)
        for page in _pages(source, table):
            for row in page:
                target.write(added, dict(zip(table.columns.keys(), row, strict=True)))
            written.add(page)
            advance(len(page))
        for page in _pages(target, table):
            found.add(page)
        if found != written:
            raise StoreError(f"{target.path}: the copy of the table {table.name} differs; nothing was changed")
        if (number := table.autoincrement_column) is not None:
            _go_on(target, table, number.name, _last_number(source, table, number.name))
        count += written.rows
    return count


def _insert(table: Table) -> Statement:
    return Statement(lambda insert: insert(table).values(row_of(table)))


def _pages(database: SharedDatabase, table: Table) -> Iterator[list[Any]]:
    """Yield all rows, in pages ordered by the primary key."""
    key = tuple(table.primary_key.columns)
    rows = select(table).order_by(*key).limit(_PAGE)
    after = rows.where(tuple_(*key) > tuple_(*(bindparam(column.name) for column in key)))
    places = [list(table.columns).index(column) for column in key]
    following = Statement(lambda _: after)
    page = database.read(Statement(lambda _: rows))
    while page:
        yield page
        page = database.read(following, {column.name: page[-1][at] for column, at in zip(key, places, strict=True)})


def _last_number(database: SharedDatabase, table: Table, column: str) -> int:
    """Return the last number that a table generated, also if its row is gone."""
    if database.engine == "postgresql":
        sql = f"SELECT CASE WHEN is_called THEN last_value ELSE 0 END FROM {table.name}_{column}_seq"
    else:
        sql = f"SELECT seq FROM sqlite_sequence WHERE name = '{table.name}'"
    highest = database.read(f"SELECT max({column}) FROM {table.name}")[0][0] or 0
    return max([int(highest), *(int(number) for (number,) in database.read(sql))])


def _go_on(database: SharedDatabase, table: Table, column: str, last: int) -> None:
    """Make the next generated number greater than `last`."""
    if database.engine == "postgresql":
        database.read(f"SELECT setval('{table.name}_{column}_seq', {max(1, last)}, {last > 0})")
    elif table.dialect_options["sqlite"]["autoincrement"] and last:
        database.write(f"DELETE FROM sqlite_sequence WHERE name = '{table.name}'")
        database.write(f"INSERT INTO sqlite_sequence(name, seq) VALUES ('{table.name}', {last})")
