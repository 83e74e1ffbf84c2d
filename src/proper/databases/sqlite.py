"""SQLite file as a shared database: one connection for all threads, waiting for other processes, emptying the log."""

from __future__ import annotations

import sqlite3
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, contextmanager, nullcontext
from functools import partial
from pathlib import Path
from typing import Any

from sqlalchemy import MetaData

from proper.databases.statements import Engine, Values, additions, created
from proper.databases.unused_space import is_in_unused_space
from proper.sqlite_files import Schema, open_shared, read_only_error, state_of, store_error

_RETRY_SECONDS = 0.01


class SqliteDatabase:
    """An SQLite file that several processes and threads share; made if it does not exist.

    Arguments and methods are those of `shared.SharedDatabase`. Tables, columns and indexes that an earlier version of
    the file's format lacks are added.
    """

    engine: Engine = "sqlite"

    def __init__(
        self,
        path: Path,
        noun: str,
        version: int,
        tables: MetaData,
        wait_seconds: float,
        may_make: Callable[[], None],
        durable: bool,
        reads_wait: bool,
    ) -> None:
        self.path, self._noun, self._lock = path, noun, threading.RLock()
        self._read_lock = self._lock if reads_wait else nullcontext()
        self._wait_seconds = wait_seconds
        schema = Schema(noun, version, created(tables), durable)
        self._open = partial(open_shared, path, schema, wait_seconds, may_make)
        self._seen = state_of(path)
        self._db, self.read_only = self._open()
        self._db.execute("PRAGMA busy_timeout = 0")  # `_patiently` waits instead
        if not self.read_only:
            self._complete(tables)

    def close(self) -> None:
        """Close the file."""
        with self._lock:
            self._db.close()

    @contextmanager
    def transaction(self, owner: object = None) -> Iterator[None]:
        """BEGIN IMMEDIATE ... COMMIT: one writer at a time, for any owner."""
        if self.read_only:
            raise read_only_error(self.path)
        with self._lock:
            if self._db.in_transaction:
                yield
                return
            try:
                self._patiently("BEGIN IMMEDIATE")
                try:
                    yield
                    self._db.execute("COMMIT")
                except BaseException:
                    if self._db.in_transaction:
                        self._db.execute("ROLLBACK")
                    raise
            except sqlite3.Error as error:
                raise store_error(self.path, error, f"the {self._noun} cannot be written: ") from error

    def read(self, sql: str, values: Values | Sequence[object] = ()) -> list[Any]:
        """Return all rows of a query."""
        try:
            with self._read_lock:
                if self.read_only:
                    self._open_again()
                return self._patiently(sql, values)
        except sqlite3.Error as error:
            raise store_error(self.path, error) from error

    def _open_again(self) -> None:
        """Open a file again that another process has changed: SQLite does not look for changes of a read-only file."""
        with self._lock:
            if (now := state_of(self.path)) != self._seen:
                # Not closed, since another thread may be reading: it ends with its last reader.
                self._seen, self._db = now, self._open().connection

    def _patiently(self, sql: str, values: Values | Sequence[object] = ()) -> list[Any]:
        """Run one statement and return its rows; wait while another process holds a lock that it needs.

        SQLite itself would wait with the connection's mutex held. Every other thread that reads then waits as well,
        with Python's global lock held while it binds values: the whole process would stand still.
        """
        deadline = time.monotonic() + self._wait_seconds
        while True:
            try:
                return self._db.execute(sql, values).fetchall()
            except sqlite3.OperationalError as error:
                if error.sqlite_errorcode & 0xFF != sqlite3.SQLITE_BUSY or time.monotonic() > deadline:
                    raise
            time.sleep(_RETRY_SECONDS)

    def write(self, sql: str, values: Values | Sequence[object] = ()) -> int:
        """Run one statement inside a transaction; return how many rows it changed."""
        return self._db.execute(sql, values).rowcount

    def wipe(self, patience: float, trace: str) -> bool:
        """Checkpoint the write-ahead log into the file and truncate it; rebuild a file with copies of `trace`."""
        deadline = time.monotonic() + patience
        try:
            # A separate connection: this process's other connections may be in the middle of a read.
            with closing(sqlite3.connect(self.path, timeout=0, isolation_level=None)) as database:
                done = _until(deadline, _checkpointed, database)
                if not done or not trace or not is_in_unused_space(self.path, trace):
                    return done
                return _until(deadline, _rebuilt, database) and _until(deadline, _checkpointed, database)
        except (sqlite3.Error, OSError) as error:
            raise store_error(self.path, error) from error

    def damage(self) -> list[str]:
        """Return what `PRAGMA integrity_check` finds."""
        messages = [row[0] for row in self.read("PRAGMA integrity_check")]
        return [] if messages == ["ok"] else messages

    def changes(self) -> str:
        """Return SQLite's `data_version`."""
        return str(self.read("PRAGMA data_version")[0][0])

    def has_table(self, name: str) -> bool:
        """Return whether the file has a table."""
        return bool(self.read("SELECT 1 FROM sqlite_master WHERE type = 'table' AND name = ?", (name,)))

    def _complete(self, tables: MetaData) -> None:
        """Add the tables, columns and indexes that a file of an earlier version lacks."""
        names = """SELECT m.name, c.name FROM sqlite_master AS m JOIN pragma_table_info(m.name) AS c
            WHERE m.type = 'table' UNION ALL SELECT tbl_name, name FROM sqlite_master WHERE type = 'index'"""
        there = set(map(tuple, self.read(names)))
        known = {
            (table.name, str(each.name)) for table in tables.sorted_tables for each in (*table.columns, *table.indexes)
        }
        if known <= there:
            return
        with self.transaction():
            there = set(map(tuple, self.read(names)))  # another process may have added them
            for statement in additions(tables, there):
                self.write(statement)


def _until(deadline: float, done: Callable[[sqlite3.Connection], bool], database: sqlite3.Connection) -> bool:
    """Repeat a call until it is done; return False after the deadline."""
    while not done(database):
        if time.monotonic() > deadline:
            return False
        time.sleep(0.02)
    return True


def _checkpointed(database: sqlite3.Connection) -> bool:
    """Empty the write-ahead log into the file; return False if another connection is in the way."""
    try:
        return not database.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchone()[0]
    except sqlite3.OperationalError as error:
        if "locked" not in str(error):
            raise
        return False


def _rebuilt(database: sqlite3.Connection) -> bool:
    """Write the whole database anew; return False if another connection writes."""
    try:
        database.execute("VACUUM")
    except sqlite3.OperationalError as error:
        if "locked" not in str(error):
            raise
        return False
    return True
