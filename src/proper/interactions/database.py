"""The database beside the adapter store: tables of interactions, known users, fits, updates and deletions.

A commit is on the disk before it returns, and deleted data is overwritten.
"""

from __future__ import annotations

from pathlib import Path

from proper.databases.shared import Contents, SharedDatabase
from proper.databases.tables import LOG

_CONTENTS = Contents("log", 1, LOG)
WAIT_SECONDS = 60.0


class Database(SharedDatabase):
    """The database of the file at `path`, made if it does not exist. Thread-safe.

    Args:
        path: the SQLite file.
        durable: whether a commit waits for the disk; data that may be lost in a machine crash need not.
        wait_seconds: how long to wait for another process that writes.
    """

    def __init__(self, path: Path, *, durable: bool = True, wait_seconds: float = WAIT_SECONDS) -> None:
        super().__init__(path, _CONTENTS, wait_seconds, durable=durable)
