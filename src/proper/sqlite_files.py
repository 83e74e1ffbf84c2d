"""Shared SQLite files of several processes: atomic creation, private permissions, WAL mode, schema version check.

A file in a folder that cannot be written is opened read-only, without creating any file beside it.
"""

from __future__ import annotations

import fcntl
import os
import secrets
import sqlite3
import time
from collections.abc import Callable, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from proper.errors import ReadOnlyError, StoreError, UnavailableError
from proper.files import PRIVATE_FILE, close_to_others, is_full, make_folder


@dataclass(frozen=True)
class Schema:
    """Schema of a SQLite file.

    Attributes:
        noun: name of the file in error messages, such as "store".
        version: SQLite's `user_version`.
        tables: the SQL statements that create the tables of a new file.
        durable: whether a commit waits for the disk (`synchronous=FULL`).
    """

    noun: str
    version: int
    tables: Sequence[str]
    durable: bool = True


class Opened(NamedTuple):
    """A connection that all threads may use, in autocommit mode, and whether it is read-only."""

    connection: sqlite3.Connection
    read_only: bool


def open_shared(path: Path, schema: Schema, wait_seconds: float, may_make: Callable[[], None] = lambda: None) -> Opened:
    """Open a SQLite file; create it if it does not exist.

    Args:
        path: the file.
        schema: the schema that the file must have.
        wait_seconds: how long to wait for another process that writes.
        may_make: called before a new file is created; raises StoreError if the file must have existed and is lost.

    Raises:
        StoreError: the file is damaged, of another schema version, or a symbolic link.
        UnavailableError: the disk is full.
    """
    try:
        if path.is_symlink():
            raise StoreError(f"{path}: is a symbolic link; put the file itself there")
        read_only = not writable(path)
        if not path.exists():
            _ask(path, may_make)
            if read_only:
                return Opened(_empty(schema), True)
            _require_no_log(path)
            _make(path, schema)
        elif path.stat().st_size == 0:
            raise StoreError(f"{path}: the file is empty, so its content is lost; restore a backup")
        connection = _connect_to_read(path) if read_only else _connect(path, schema, wait_seconds)
    except (sqlite3.Error, OSError) as error:
        raise store_error(path, error) from error
    try:
        _require(path, connection, schema)
    except BaseException:
        connection.close()
        raise
    return Opened(connection, read_only)


def _ask(path: Path, may_make: Callable[[], None]) -> None:
    try:
        may_make()
    except StoreError:
        if not path.exists():  # made by another process meanwhile
            raise


def _require_no_log(path: Path) -> None:
    """Refuse to make a file beside the log of a lost one: SQLite would write its pages into the new file."""
    for log in (path.with_name(path.name + end) for end in ("-wal", "-journal")):
        if log.exists() and log.stat().st_size and not path.exists():
            raise StoreError(f"{path}: is missing, but {log.name} is there; restore a backup and remove {log.name}")


def writable(path: Path) -> bool:
    """Return whether this process may write a file, or create it and SQLite's files beside it."""
    there = next(each for each in (path.parent, *path.parents) if each.exists())
    return os.access(there, os.W_OK | os.X_OK) and (not path.exists() or os.access(path, os.W_OK))


def state_of(path: Path) -> list[tuple[int, int, int] | None]:
    """Return what changes when a process writes to a file: inode, time and size of it and of its write-ahead log."""
    found = list[tuple[int, int, int] | None]()
    for each in (path, path.with_name(f"{path.name}-wal")):
        try:
            status = each.stat()
        except FileNotFoundError:
            found.append(None)
        else:
            found.append((status.st_ino, status.st_mtime_ns, status.st_size))
    return found


def store_error(path: Path, error: Exception, what: str = "") -> StoreError:
    """Return the error for a file that SQLite cannot read or write; a full disk is not damage."""
    if is_full(error):
        return UnavailableError(f"{path}: {what}no space is left on the disk")
    return StoreError(f"{path}: {what}{error}")


def read_only_error(path: Path) -> ReadOnlyError:
    """Return the error for a write to a file that was opened read-only."""
    return ReadOnlyError(f"{path}: is read-only here, so nothing can be changed in this run")


def _make(path: Path, schema: Schema) -> None:
    """Create the file under a temporary name and link it into place: no process ever sees it without tables."""
    make_folder(path.parent)
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(8)}.tmp")
    os.close(os.open(temporary, os.O_RDWR | os.O_CREAT | os.O_EXCL, PRIVATE_FILE))
    try:
        with closing(sqlite3.connect(temporary, isolation_level=None)) as new:
            new.execute("PRAGMA journal_mode=OFF")  # a kill leaves nothing that `files.sweep` does not know
            _add_tables(new, schema)
        try:
            os.link(temporary, path)
        except FileExistsError:
            return  # another process was faster
        except FileNotFoundError:  # `files.sweep` took it for the file of a killed process
            _make(path, schema)
        except OSError:  # a file system without hard links
            _rename(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def _rename(temporary: Path, path: Path) -> None:
    """Rename a new file into its place, unless another process was faster: what that one wrote would be lost."""
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        fcntl.flock(folder, fcntl.LOCK_EX)
        if not path.exists():
            os.replace(temporary, path)
    finally:
        os.close(folder)


def _add_tables(new: sqlite3.Connection, schema: Schema) -> None:
    new.execute("BEGIN")
    for table in schema.tables:
        new.execute(table)
    new.execute(f"PRAGMA user_version={schema.version}")
    new.execute("COMMIT")


def open_to_read(path: Path) -> sqlite3.Connection:
    """Return a read-only connection to a SQLite file.

    If a process that changed the file was killed, the change is undone first: a read-only connection cannot do that.

    Raises:
        StoreError: the file is in a folder that cannot be written, and a part of its write-ahead log is missing.
    """
    if path.with_name(f"{path.name}-journal").exists():
        with closing(sqlite3.connect(f"{path.absolute().as_uri()}?mode=rw", uri=True)) as database:
            database.execute("SELECT count(*) FROM sqlite_master").fetchone()
    if not writable(path):
        return _connect_to_read(path)
    return sqlite3.connect(f"{path.absolute().as_uri()}?mode=ro", uri=True, check_same_thread=False)


def _empty(schema: Schema) -> sqlite3.Connection:
    """Return an empty in-memory database in place of a file that does not exist and cannot be created."""
    connection = sqlite3.connect(":memory:", isolation_level=None, check_same_thread=False)
    _add_tables(connection, schema)
    connection.execute("PRAGMA query_only=ON")
    return connection


def _connect(path: Path, schema: Schema, wait_seconds: float) -> sqlite3.Connection:
    # SQLite gives -wal and -shm the mode of the file.
    for each in (path, *(path.with_name(path.name + end) for end in ("-wal", "-shm"))):
        if each.exists():
            close_to_others(each)
    connection = sqlite3.connect(path, timeout=wait_seconds, isolation_level=None, check_same_thread=False)
    try:
        deadline = time.monotonic() + wait_seconds
        while True:
            try:
                connection.execute("PRAGMA journal_mode=WAL")
                break
            except sqlite3.OperationalError as error:
                # SQLite's timeout does not cover another process that is creating the same file.
                if "locked" not in str(error) or time.monotonic() > deadline:
                    raise
                time.sleep(0.01)
        connection.execute(f"PRAGMA synchronous={'FULL' if schema.durable else 'NORMAL'}")
        connection.execute("PRAGMA secure_delete=ON")
    except BaseException:
        connection.close()
        raise
    return connection


def _connect_to_read(path: Path) -> sqlite3.Connection:
    wal = path.with_name(path.name + "-wal")
    held = wal.exists() and wal.stat().st_size > 0
    if held and not path.with_name(path.name + "-shm").exists():
        raise StoreError(f"{path}: {wal.name} cannot be read without {path.name}-shm in a read-only folder; copy both")
    # Without a WAL this file is complete; immutable=1 keeps SQLite from creating a WAL.
    options = "mode=ro" if held else "mode=ro&immutable=1"
    uri = f"{path.absolute().as_uri()}?{options}"
    return sqlite3.connect(uri, uri=True, isolation_level=None, check_same_thread=False)


def _require(path: Path, connection: sqlite3.Connection, schema: Schema) -> None:
    try:
        (version,) = connection.execute("PRAGMA user_version").fetchone()
        (tables,) = connection.execute("SELECT COUNT(*) FROM sqlite_master").fetchone()
    except sqlite3.Error as error:
        raise store_error(path, error) from error
    if version == 0 and not tables:
        raise StoreError(f"{path}: holds no tables, so its content is lost; restore a backup")
    found = 1 if version == 0 else version  # the first store format had no version number
    if found != schema.version:
        raise StoreError(f"{path}: {schema.noun} of another version of proper (format {found})")
