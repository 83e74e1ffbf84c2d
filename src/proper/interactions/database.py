"""The SQLite file beside the adapter store: tables of interactions, known users, fits and deletions.

A commit is on the disk before it returns, and deleted data is overwritten.
"""

from __future__ import annotations

import sqlite3
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from proper.adapters.manifest import empty_wal
from proper.errors import StoreError
from proper.sqlite_files import Schema, open_shared, read_only_error

FORMAT = 1
WAIT_SECONDS = 60.0
_TABLES = (
    "CREATE TABLE people (tenant TEXT NOT NULL, user BLOB NOT NULL, PRIMARY KEY (tenant, user)) WITHOUT ROWID",
    # `number` is the order of arrival; numbers are never reused.
    """CREATE TABLE interactions (
        number INTEGER PRIMARY KEY AUTOINCREMENT, tenant TEXT NOT NULL, user BLOB NOT NULL, id TEXT NOT NULL,
        prompt TEXT NOT NULL, target TEXT NOT NULL, time REAL, received REAL NOT NULL, UNIQUE (tenant, user, id))""",
    # `wanted` counts fit requests; a fit that began before the last request is queued again when it ends.
    """CREATE TABLE fits (
        tenant TEXT NOT NULL, user BLOB NOT NULL, state TEXT NOT NULL, place INTEGER, wanted INTEGER NOT NULL,
        claim INTEGER, attempts INTEGER NOT NULL, progress REAL NOT NULL, phase TEXT, message TEXT, version INTEGER,
        PRIMARY KEY (tenant, user)) WITHOUT ROWID""",
    "CREATE INDEX fits_by_place ON fits (state, place)",
    "CREATE TABLE counters (name TEXT PRIMARY KEY, value INTEGER NOT NULL) WITHOUT ROWID",
)
# Early files of this format lack this table. `user` is NULL once only write-ahead logs remain to be emptied.
_DELETIONS = """CREATE TABLE IF NOT EXISTS deletions (
    job TEXT PRIMARY KEY, tenant TEXT NOT NULL, user BLOB, state TEXT NOT NULL, ended REAL) WITHOUT ROWID"""


class Database:
    """The file at `path`, created if it does not exist. Thread-safe.

    Args:
        path: the file.
        durable: whether a commit waits for the disk; data that may be lost in a machine crash need not.
        wait_seconds: how long to wait for another process that writes.
    """

    def __init__(self, path: Path, *, durable: bool = True, wait_seconds: float = WAIT_SECONDS) -> None:
        self.path = path
        # Readers take the lock too: on a shared connection they would see another thread's uncommitted data.
        self._lock = threading.RLock()
        self._db, self.read_only = open_shared(
            path, Schema("a log", FORMAT, (*_TABLES, _DELETIONS), durable), wait_seconds
        )
        if not self.read_only and not self.has_deletions():
            self._db.execute(_DELETIONS)

    def has_deletions(self) -> bool:
        """Whether the file has the table of deletions; a read-only file of an earlier version lacks it."""
        return bool(self.read("SELECT 1 FROM sqlite_master WHERE name = 'deletions'"))

    def close(self) -> None:
        """Close the file."""
        with self._lock:
            self._db.close()

    @contextmanager
    def transaction(self) -> Iterator[None]:
        """BEGIN IMMEDIATE ... COMMIT, rolled back on any error; a nested transaction joins the outer one.

        Raises:
            StoreError: another process writes for too long, or the disk is full or broken.
            ReadOnlyError: the file is read-only.
        """
        if self.read_only:
            raise read_only_error(self.path)
        with self._lock:
            if self._db.in_transaction:
                yield
                return
            try:
                self._db.execute("BEGIN IMMEDIATE")
                try:
                    yield
                    self._db.execute("COMMIT")
                except BaseException:
                    if self._db.in_transaction:
                        self._db.execute("ROLLBACK")
                    raise
            except sqlite3.Error as error:
                raise StoreError(f"{self.path}: the log cannot be written: {error}") from error

    def read(self, sql: str, values: Sequence[Any] = ()) -> list[Any]:
        """Return all rows of a query.

        Raises:
            StoreError: the file is damaged.
        """
        try:
            with self._lock:
                return self._db.execute(sql, values).fetchall()
        except sqlite3.Error as error:
            raise StoreError(f"{self.path}: {error}") from error

    def write(self, sql: str, values: Sequence[Any] = ()) -> int:
        """Run one statement inside a transaction; return how many rows it changed."""
        return self._db.execute(sql, values).rowcount

    def wipe(self, patience: float = 1.0) -> bool:
        """Checkpoint the write-ahead log into the file and truncate it, so that no deleted data is left in it.

        Returns False if another process reads or writes for longer than `patience` (seconds).
        """
        return empty_wal(self.path, patience)
