"""PostgreSQL schema as a shared database: pooled connections, one per reading thread and one per open transaction.

Writers keep the order that SQLite gives them: a transaction without an owner runs alone, those of different users run
together. Advisory locks do this, which end with the transaction, also when the process or its machine dies.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psycopg
from sqlalchemy import MetaData

from proper.databases.location import Location
from proper.databases.postgresql.connections import POOLS, lock_key, open_pool, translated
from proper.databases.postgresql.migrations import migrate
from proper.databases.statements import Engine, Values
from proper.sqlite_files import read_only_error, writable


class PostgresqlDatabase:
    """A run's schema, made if it does not exist. Arguments and methods are those of `shared.SharedDatabase`."""

    engine: Engine = "postgresql"

    def __init__(
        self, path: Path, location: Location, noun: str, tables: MetaData, wait_seconds: float, durable: bool
    ) -> None:
        self.path, self._where, self._noun = path, location, noun
        self._tables = [table.name for table in tables.sorted_tables]
        self.read_only = not writable(path)
        self._local = threading.local()
        self._key = lock_key(noun, location.schema)
        durably = "" if durable else "SET LOCAL synchronous_commit = off; "
        self._begin = f"BEGIN; SET LOCAL lock_timeout = {max(1, round(1000 * wait_seconds))}; {durably}"
        with translated(location, ""):
            self._pool = POOLS.take(location)
        self._closed = False

    def close(self) -> None:
        """Close the connections, unless another database of this process uses them."""
        if not self._closed:
            self._closed = True
            POOLS.release(self._where)

    @contextmanager
    def transaction(self, owner: tuple[str, bytes] | str | None = None) -> Iterator[None]:
        """BEGIN ... COMMIT, with the locks of an owner; "any" locks the rows that its statements lock, and no user."""
        if self.read_only:
            raise read_only_error(self.path)
        if self._current() is not None:
            yield
            return
        with (
            translated(self._where, f"the {self._noun} cannot be written: "),
            self._connected(self._begin + self._locks(owner)) as connection,
        ):
            self._local.connection = connection
            try:
                yield
                connection.execute("COMMIT")
            except BaseException:
                if not connection.closed:
                    connection.execute("ROLLBACK")
                raise
            finally:
                self._local.connection = None

    def read(self, sql: str, values: Values | Sequence[object]) -> list[Any]:
        """Return all rows of a query."""
        connection = self._current()
        if connection is not None:
            return connection.execute(sql, values).fetchall()
        with translated(self._where, ""), self._connected() as connection:
            try:
                return connection.execute(sql, values).fetchall()
            except psycopg.OperationalError:
                if not connection.closed:
                    raise
        # The server was restarted, or the connection was dropped: a read can be repeated.
        self._pool.dispose()
        with translated(self._where, ""), self._connected() as connection:
            return connection.execute(sql, values).fetchall()

    def write(self, sql: str, values: Values | Sequence[object]) -> int:
        """Run one statement inside a transaction; return how many rows it changed."""
        connection = self._current()
        assert connection is not None
        return connection.execute(sql, values).rowcount

    def wipe(self, patience: float, trace: str) -> bool:
        """Vacuum the tables; with a patience of 0 this is left to a later call, or to the server."""
        if patience > 0:
            with translated(self._where, ""), self._connected() as connection:
                connection.execute(f"VACUUM {', '.join(self._tables)}")
        return True

    def damage(self) -> list[str]:
        """Return nothing: PostgreSQL's own tools check its tables."""
        return []

    def changes(self) -> str:
        """Return the snapshot, which any commit on the server changes."""
        return str(self.read("SELECT pg_current_snapshot()::text", ())[0][0])

    def has_table(self, name: str) -> bool:
        """Return True: the migrations have made every table."""
        return True

    def _current(self) -> psycopg.Connection[Any] | None:
        """Return the connection of this thread's open transaction."""
        return getattr(self._local, "connection", None)

    @contextmanager
    def _connected(self, begin: str | None = None) -> Iterator[psycopg.Connection[Any]]:
        """Yield a connection of the pool while the block runs, after it ran `begin`."""
        pooled = self._pool.raw_connection()
        try:
            connection = pooled.driver_connection
            assert isinstance(connection, psycopg.Connection)
            if begin is not None:
                try:
                    connection.execute(begin)
                except psycopg.OperationalError:
                    if not connection.closed:
                        connection.execute("ROLLBACK")
                        raise
                    # The server was restarted: nothing has begun, so a new connection can begin it.
                    self._pool.dispose()
                    pooled.invalidate()
                    pooled = self._pool.raw_connection()
                    connection = pooled.driver_connection
                    assert isinstance(connection, psycopg.Connection)
                    connection.execute(begin)
            yield connection
            if connection.closed:
                pooled.invalidate()
        finally:
            pooled.close()

    def _locks(self, owner: tuple[str, bytes] | str | None) -> str:
        if owner is None:
            return f"SELECT pg_advisory_xact_lock({self._key})"
        shared = f"SELECT pg_advisory_xact_lock_shared({self._key})"
        if isinstance(owner, str):
            return shared
        own = lock_key(self._noun, self._where.schema, owner[0], owner[1].hex())
        return f"{shared}; SELECT pg_advisory_xact_lock({own})"


def make_schema(location: Location) -> None:
    """Make the schema of a new run, without others' rights on it, and its tables.

    Raises:
        StoreError: the database cannot be reached, or the schema cannot be made.
    """
    pool = open_pool(location)
    try:
        with translated(location, ""), pool.begin() as connection:
            connection.exec_driver_sql(f'CREATE SCHEMA "{location.schema}"')
        with translated(location, ""):
            migrate(pool, location)
    finally:
        pool.dispose()


def drop_schema(location: Location) -> None:
    """Remove the schema of a run with everything in it, if it is there.

    Raises:
        StoreError: the database cannot be reached, or the schema is used.
    """
    pool = open_pool(location)
    try:
        with translated(location, ""), pool.connect() as connection:
            connection.exec_driver_sql(f'DROP SCHEMA IF EXISTS "{location.schema}" CASCADE')
    finally:
        pool.dispose()


def cells(location: Location) -> Iterator[bytes]:
    """Yield all texts and bytes in the rows of a run's tables, divided by zeros, a thousand rows at a time."""
    names = "SELECT tablename FROM pg_tables WHERE schemaname = current_schema() ORDER BY tablename"
    pool = open_pool(location)
    try:
        with translated(location, ""), pool.connect() as connection:
            # A named cursor, which reads in pieces, needs a transaction.
            reading = connection.execution_options(isolation_level="REPEATABLE READ", stream_results=True)
            for (name,) in reading.exec_driver_sql(names).fetchall():
                for some in reading.exec_driver_sql(f'SELECT * FROM "{name}"').partitions(1000):
                    found = [cell for row in some for cell in (b"", *row, b"") if isinstance(cell, str | bytes)]
                    yield b"\0".join(cell.encode() if isinstance(cell, str) else cell for cell in found)
    finally:
        pool.dispose()
