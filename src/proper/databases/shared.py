"""A database that several processes and threads share, behind one interface: an SQLite file or a PostgreSQL schema."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol

from sqlalchemy import MetaData

from proper.databases.location import Location, location_of
from proper.databases.sqlite import SqliteDatabase
from proper.databases.statements import Engine, Statement, Values
from proper.databases.tables import RUN
from proper.extras import needs_extra
from proper.run_folder import RunFolder

Owner = tuple[str, bytes] | Literal["any"]
"""Tenant and key of a user; "any" for a transaction that locks the rows that it changes itself."""
_RUN_WAIT_SECONDS = 60.0
NOTHING: Values = {}
"""The values of a statement that has none."""


@dataclass(frozen=True)
class Contents:
    """Description of a database's content.

    Attributes:
        noun: name in error messages, such as "store".
        version: the format of its SQLite file (`user_version`).
        tables: its tables.
    """

    noun: str
    version: int
    tables: MetaData


class Backend(Protocol):
    """An open database; see `SharedDatabase`, which passes everything on to it."""

    @property
    def engine(self) -> Engine:
        """The SQL dialect."""

    @property
    def read_only(self) -> bool:
        """Whether nothing can be written."""

    def close(self) -> None: ...  # noqa: D102
    def transaction(self, owner: Owner | None) -> AbstractContextManager[None]: ...  # noqa: D102
    def read(self, sql: str, values: Values | Sequence[object]) -> list[Any]: ...  # noqa: D102
    def write(self, sql: str, values: Values | Sequence[object]) -> int: ...  # noqa: D102
    def wipe(self, patience: float, trace: str) -> bool: ...  # noqa: D102
    def damage(self) -> list[str]: ...  # noqa: D102
    def changes(self) -> str: ...  # noqa: D102
    def has_table(self, name: str) -> bool: ...  # noqa: D102


class SharedDatabase:
    """A shared database, made if it does not exist. Thread-safe.

    Args:
        path: the SQLite file.
        contents: what the database holds.
        wait_seconds: how long to wait for another process that writes.
        may_make: called before a new SQLite file is made; raises StoreError if the file must have been lost.
        durable: whether a commit waits for the disk; data that may be lost in a machine crash need not.
        reads_wait: whether a read of an SQLite file waits for another thread's transaction to end; otherwise it may see
            that transaction's uncommitted rows.

    Raises:
        StoreError: the database is damaged, or of another version.
    """

    def __init__(
        self,
        path: Path,
        contents: Contents,
        wait_seconds: float,
        may_make: Callable[[], None] = lambda: None,
        *,
        durable: bool = True,
        reads_wait: bool = True,
    ) -> None:
        self.path, location = path, location_of(path.parent)
        self._backend: Backend = (
            SqliteDatabase(
                path, contents.noun, contents.version, contents.tables, wait_seconds, may_make, durable, reads_wait
            )
            if location is None
            else _postgresql(path, location, contents, wait_seconds, durable)
        )

    @property
    def engine(self) -> Engine:
        """The SQL dialect: "sqlite" or "postgresql"."""
        return self._backend.engine

    @property
    def read_only(self) -> bool:
        """Whether nothing can be written."""
        return self._backend.read_only

    def close(self) -> None:
        """Close the database."""
        self._backend.close()

    def transaction(self, owner: Owner | None = None) -> AbstractContextManager[None]:
        """Return a transaction: committed when its block ends, rolled back on any error. A nested one joins it.

        A transaction that names an `owner` changes rows of that user only: PostgreSQL runs such transactions of
        different users at the same time, and those of owner "any" beside them. All others run one at a time, alone.

        Raises:
            StoreError: another process writes for too long, or the disk is full or broken.
            ReadOnlyError: the database is read-only.
        """
        return self._backend.transaction(owner)

    def read(self, statement: Statement | str, values: Values | Sequence[object] = NOTHING) -> list[Any]:
        """Return all rows of a query; a text is passed to the driver as it is.

        Raises:
            StoreError: the database is damaged, or cannot be reached.
        """
        return self._backend.read(*self._bound(statement, values))

    def write(self, statement: Statement | str, values: Values | Sequence[object] = NOTHING) -> int:
        """Run one statement inside a transaction; return how many rows it changed."""
        return self._backend.write(*self._bound(statement, values))

    def wipe(self, patience: float = 1.0, trace: str = "") -> bool:
        """Remove what deleted rows left behind: SQLite's write-ahead log is emptied, PostgreSQL's tables are vacuumed.

        Returns False if another process reads or writes an SQLite file for longer than `patience` (seconds): its
        write-ahead log then still holds deleted data. An SQLite file with the text `trace` in its unused space is
        rebuilt (see `unused_space`). A piece of such a copy without `trace` is not noticed.

        Raises:
            StoreError: the database is damaged, or the disk full.
        """
        return self._backend.wipe(patience, trace)

    def damage(self) -> list[str]:
        """Return what the engine's own check finds, one text each; PostgreSQL's tables are not checked."""
        return self._backend.damage()

    def changes(self) -> str:
        """Return a value that changes whenever another connection has committed."""
        return self._backend.changes()

    def has_table(self, name: str) -> bool:
        """Return whether there is a table; a read-only file of an earlier version lacks some."""
        return self._backend.has_table(name)

    def _bound(
        self, statement: Statement | str, values: Values | Sequence[object]
    ) -> tuple[str, Values | Sequence[object]]:
        if isinstance(statement, str):
            return statement, values
        sql, constants = statement.text(self._backend.engine)
        return sql, {**constants, **values} if constants else values  # type: ignore[dict-item]


def _postgresql(path: Path, location: Location, contents: Contents, wait_seconds: float, durable: bool) -> Backend:
    with needs_extra("postgresql", f"the state of this run, which is in {location},"):
        from proper.databases.postgresql.database import PostgresqlDatabase
    return PostgresqlDatabase(path, location, contents.noun, contents.tables, wait_seconds, durable)


def open_run(run: Path) -> SharedDatabase | None:
    """Open the tables of a run that SQLite does not have (`tables.RUN`); None for a run with SQLite."""
    users = RunFolder(run).users
    if location_of(users.path) is None:
        return None
    return SharedDatabase(users.manifest, Contents("run", 1, RUN), _RUN_WAIT_SECONDS)
