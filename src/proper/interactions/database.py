"""The SQLite file beside the adapter store: tables of interactions, known users, fits, updates and deletions.

A commit is on the disk before it returns, and deleted data is overwritten.
"""

from __future__ import annotations

from pathlib import Path

from proper.sqlite_files import Schema, SharedFile

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
# Early files of this format lack these tables. `user` is NULL once only write-ahead logs remain to be emptied.
_DELETIONS = """CREATE TABLE IF NOT EXISTS deletions (
    job TEXT PRIMARY KEY, tenant TEXT NOT NULL, user BLOB, state TEXT NOT NULL, ended REAL) WITHOUT ROWID"""
# `version` is NULL for an update that was not promoted; `facts` is JSON.
_UPDATES = """CREATE TABLE IF NOT EXISTS updates (
    number INTEGER PRIMARY KEY AUTOINCREMENT, tenant TEXT NOT NULL, user BLOB NOT NULL, ended REAL NOT NULL,
    base INTEGER NOT NULL, version INTEGER, seconds REAL NOT NULL, reason TEXT NOT NULL, facts TEXT NOT NULL)"""
_UPDATES_INDEX = "CREATE INDEX IF NOT EXISTS updates_by_user ON updates (tenant, user, number)"
_LATER = {"deletions": (_DELETIONS,), "updates": (_UPDATES, _UPDATES_INDEX)}


class Database(SharedFile):
    """The file at `path`, created if it does not exist. Thread-safe.

    Args:
        path: the file.
        durable: whether a commit waits for the disk; data that may be lost in a machine crash need not.
        wait_seconds: how long to wait for another process that writes.
    """

    def __init__(self, path: Path, *, durable: bool = True, wait_seconds: float = WAIT_SECONDS) -> None:
        later = [statement for statements in _LATER.values() for statement in statements]
        super().__init__(path, Schema("log", FORMAT, (*_TABLES, *later), durable), wait_seconds)
        missing = [name for name in _LATER if not self.read_only and not self.has_table(name)]
        if missing:
            with self.transaction():
                for name in missing:
                    for statement in _LATER[name]:
                        self.write(statement)

    def has_table(self, name: str) -> bool:
        """Whether the file has a table; a read-only file of an earlier version lacks some."""
        return bool(self.read("SELECT 1 FROM sqlite_master WHERE name = ?", (name,)))
