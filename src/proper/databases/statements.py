"""SQL statements built with SQLAlchemy Core, compiled once per dialect and run on the driver's own connection.

Core's execution (cache key, result objects) takes several times as long as SQLite needs to read a user's row. Values
are passed by name, and reach the driver unchanged: text, bytes, integers, floats and None are the same for both.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from functools import cache
from typing import Any, Literal

from sqlalchemy import BindParameter, ClauseElement, ColumnElement, Double, MetaData, Table, and_, bindparam
from sqlalchemy.dialects import postgresql, sqlite
from sqlalchemy.dialects.postgresql.psycopg import PGDialect_psycopg
from sqlalchemy.dialects.sqlite.pysqlite import SQLiteDialect_pysqlite
from sqlalchemy.engine import Dialect
from sqlalchemy.ext.compiler import compiles
from sqlalchemy.schema import CreateColumn, CreateIndex, CreateTable
from sqlalchemy.sql.functions import FunctionElement

Engine = Literal["sqlite", "postgresql"]
Values = Mapping[str, object]
Insert = Callable[[Any], Any]
"""The dialect's `insert`, with support for ON CONFLICT."""

_DIALECTS: dict[Engine, Dialect] = {
    "sqlite": SQLiteDialect_pysqlite(paramstyle="named"),
    "postgresql": PGDialect_psycopg(),  # type: ignore[no-untyped-call]
}
_INSERTS: dict[Engine, Insert] = {"sqlite": sqlite.insert, "postgresql": postgresql.insert}


class Statement:
    """One statement; `make` returns it, with the names of its values as bind parameters.

    `make` is called with the dialect's `insert` once per dialect, when the statement is first used.
    """

    def __init__(self, make: Callable[[Insert], ClauseElement]) -> None:
        self._make = make
        self._compiled: dict[Engine, tuple[str, Values]] = {}

    def text(self, engine: Engine) -> tuple[str, Values]:
        """Return the SQL of a dialect, and the values that are constants of the statement."""
        compiled = self._compiled.get(engine)
        if compiled is None:
            made: Any = self._make(_INSERTS[engine]).compile(dialect=_DIALECTS[engine])
            constants = {made.bind_names[bind]: bind.value for bind in made.bind_names if not bind.required}
            compiled = self._compiled[engine] = str(made), constants
        return compiled


def of_user(table: Table) -> ColumnElement[bool]:
    """Return the condition that a row is of the user with the values `tenant` and `user`."""
    return and_(table.c.tenant == bindparam("tenant"), table.c.user == bindparam("user"))


def row_of(table: Table, *, without: str = "") -> dict[str, BindParameter[Any]]:
    """Return the values of an `insert`: one parameter per column, with its name, `without` a generated number."""
    names = [column.name for column in table.columns if column.name != without]
    return {name: bindparam(name, type_=table.c[name].type) for name in names}


class now(FunctionElement[float]):
    """The time of the database's machine, in seconds since 1970: workers on several machines need one clock."""

    type = Double()
    inherit_cache = True


@compiles(now, "sqlite")
def _now_of_sqlite(element: now, compiler: Any, **options: Any) -> str:
    return "((julianday('now') - 2440587.5) * 86400.0)"


@compiles(now, "postgresql")
def _now_of_postgresql(element: now, compiler: Any, **options: Any) -> str:
    return "CAST(extract(epoch FROM clock_timestamp()) AS double precision)"


@cache
def created(tables: MetaData) -> tuple[str, ...]:
    """Return the statements that create these tables and their indexes in SQLite."""
    return tuple(statement for table in tables.sorted_tables for statement in _created(table))


def additions(tables: MetaData, there: set[tuple[str, str]]) -> Iterator[str]:
    """Yield the statements that add to a SQLite file what is not `there`.

    `there` has each table with each of its columns and indexes.
    """
    for table in tables.sorted_tables:
        if table.name not in {name for name, _ in there}:
            yield from _created(table)
            continue
        for column in table.columns:
            if (table.name, column.name) not in there:
                yield f"ALTER TABLE {table.name} ADD COLUMN {CreateColumn(column).compile(dialect=_DIALECTS['sqlite'])}"
        yield from (made for name, made in _indexes(table) if (table.name, name) not in there)


def _created(table: Table) -> Iterator[str]:
    yield str(CreateTable(table).compile(dialect=_DIALECTS["sqlite"]))
    yield from (made for _, made in _indexes(table))


def _indexes(table: Table) -> Iterator[tuple[str, str]]:
    for index in table.indexes:
        yield str(index.name), str(CreateIndex(index).compile(dialect=_DIALECTS["sqlite"]))
