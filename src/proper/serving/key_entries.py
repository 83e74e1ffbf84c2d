"""Entries of API keys, and the two places for them: a file of the run folder, or a table in PostgreSQL."""

from __future__ import annotations

import json
import os
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal, Protocol

from pydantic import TypeAdapter, ValidationError
from sqlalchemy import bindparam, delete, select

from proper.databases.shared import SharedDatabase, open_run
from proper.databases.statements import Statement, row_of
from proper.databases.tables import API_KEYS, SETTINGS
from proper.errors import ProperError, ReadOnlyError, StoreError
from proper.files import is_full, locked, private_folder, write_json, write_text
from proper.json_records import first_problem, read_record
from proper.run_folder import RunFolder

Scope = Literal["generate", "write", "admin"]
_RUN = RunFolder(Path())
_STALE_SECONDS = 1.0  # age at which the keys are read again


@dataclass(frozen=True)
class KeyEntry:
    """The stored entry of a key: the id, which is the beginning of the hash, the hash, and the scopes."""

    id: str
    sha256: str
    tenant: str
    scopes: tuple[Scope, ...]
    created: int


class DamagedKeysError(ProperError):
    """The keys cannot be read, so no request can be authenticated."""


class KeyEntries(Protocol):
    """Where the entries are."""

    def changing(self) -> AbstractContextManager[None]:
        """Keep other processes and threads from changing the entries while the block runs."""

    def read(self) -> dict[str, KeyEntry]:
        """Return the entries by hash.

        Raises:
            DamagedKeysError: they cannot be read.
        """

    def write(self, entries: Sequence[KeyEntry]) -> None:
        """Replace all entries, and record that there has been a key."""

    def required(self) -> bool:
        """Return whether there is a key, or has been one since `clear`."""

    def remember(self) -> None:
        """Record that there has been a key, if an earlier version did not."""

    def clear(self) -> None:
        """Forget that there have been keys."""

    def close(self) -> None:
        """Release what reading needs."""


class KeyFile:
    """The file at `path`, which need not exist, and `keys.required` beside it."""

    def __init__(self, path: Path) -> None:
        self.path, self._marker = path, path.with_name(_RUN.keys_required.name)
        self._seen: tuple[int, int, int] | None = None
        self._entries: dict[str, KeyEntry] = {}
        self._lock = threading.Lock()

    def required(self) -> bool:
        """Return whether either file exists."""
        return self._marker.exists() or self.path.exists()

    def remember(self) -> None:
        """Write `keys.required` if there is a key file without it, made by an earlier version."""
        if self.path.exists() and not self._marker.exists() and os.access(self.path.parent, os.W_OK):
            self._mark()

    def close(self) -> None:
        """Do nothing: the file is not kept open."""

    def clear(self) -> None:
        """Remove both files."""
        self.path.unlink(missing_ok=True)
        self._marker.unlink(missing_ok=True)

    @contextmanager
    def changing(self) -> Iterator[None]:
        """Hold the file lock, so that no other process or thread changes the file between read and write.

        Raises:
            ReadOnlyError: the folder cannot be written.
            ProperError: the disk is full.
        """
        try:
            private_folder(self.path.parent)
            with locked(self.path.with_name(_RUN.keys_lock.name)):
                yield
        except OSError as error:
            kind = ProperError if is_full(error) else ReadOnlyError
            raise kind(f"{self.path}: keys cannot be changed: {error.strerror or error}") from error

    def write(self, entries: Sequence[KeyEntry]) -> None:
        """Write the marker, then the entries."""
        self._mark()
        write_json(self.path, {"schema": 1, "keys": [asdict(entry) for entry in entries]})

    def read(self) -> dict[str, KeyEntry]:
        """Return the entries by hash; the file is read again when it has changed."""
        try:
            found = os.stat(self.path)
        except FileNotFoundError:
            return {}
        stamp = (found.st_mtime_ns, found.st_ino, found.st_size)
        with self._lock:
            if stamp != self._seen:
                self._entries, self._seen = {entry.sha256: entry for entry in _entries(self.path)}, stamp
            return self._entries

    def _mark(self) -> None:
        if not self._marker.exists():
            write_text(self._marker, "This run has had API keys: requests without a valid key are refused.\n")


_KEYS = TypeAdapter(list[KeyEntry])
_RESTORE = "restore a copy of it, or remove it and add keys again"


def _entries(path: Path) -> list[KeyEntry]:
    try:
        found = read_record(path, _RESTORE, keys=list)["keys"]
        return _KEYS.validate_json(json.dumps(found), strict=True)  # strict takes JSON's lists for tuples, not Python's
    except ValidationError as error:
        raise DamagedKeysError(f"{path}: keys.{first_problem(error)}; {_RESTORE}") from error
    except OSError as error:
        raise DamagedKeysError(f"{path}: cannot be read: {error.strerror or error}; {_RESTORE}") from error
    except ProperError as error:
        raise DamagedKeysError(str(error)) from error


_ENTRIES = Statement(lambda _: select(API_KEYS).order_by(API_KEYS.c.created))
_CLEAR = Statement(lambda _: delete(API_KEYS))
_ADD = Statement(lambda insert: insert(API_KEYS).values(row_of(API_KEYS)))
_MARKED = Statement(lambda _: select(SETTINGS.c.value).where(SETTINGS.c.name == bindparam("name")))
_MARK = Statement(lambda insert: insert(SETTINGS).values(row_of(SETTINGS)).on_conflict_do_nothing())
_UNMARK = Statement(lambda _: delete(SETTINGS).where(SETTINGS.c.name == bindparam("name")))
_SETTING = {"name": "keys"}


class KeyRows:
    """The tables `api_keys` and `settings` of a run in PostgreSQL; read again when they were read a second ago."""

    def __init__(self, database: SharedDatabase) -> None:
        self._database, self._lock = database, threading.Lock()
        self._read_at, self._entries, self._required = -_STALE_SECONDS, dict[str, KeyEntry](), True

    def required(self) -> bool:
        """Return whether there is an entry or the mark of one; True if the database cannot be reached."""
        try:
            self.read()
        except DamagedKeysError:
            return True
        return self._required

    def remember(self) -> None:
        """Do nothing: every version that has the table writes the mark."""

    def close(self) -> None:
        """Close the connections."""
        self._database.close()

    def clear(self) -> None:
        """Remove the mark (inside `changing`)."""
        self._database.write(_UNMARK, _SETTING)

    @contextmanager
    def changing(self) -> Iterator[None]:
        """Run a transaction beside which no other changes the entries."""
        try:
            with self._database.transaction():
                self._read_at = -_STALE_SECONDS
                yield
        finally:
            self._read_at = -_STALE_SECONDS

    def write(self, entries: Sequence[KeyEntry]) -> None:
        """Replace all rows (inside `changing`)."""
        self._database.write(_MARK, {**_SETTING, "value": "required"})
        self._database.write(_CLEAR)
        for entry in entries:
            self._database.write(_ADD, {**asdict(entry), "scopes": " ".join(entry.scopes)})

    def read(self) -> dict[str, KeyEntry]:
        """Return the entries by hash, at most a second old."""
        with self._lock:
            if time.monotonic() - self._read_at >= _STALE_SECONDS:
                try:
                    rows = self._database.read(_ENTRIES)
                    self._required = bool(rows or self._database.read(_MARKED, _SETTING))
                except StoreError as error:
                    raise DamagedKeysError(str(error)) from error
                found = [dict(zip(API_KEYS.columns.keys(), row, strict=True)) for row in rows]
                self._entries = {
                    row["sha256"]: KeyEntry(**{**row, "scopes": tuple(row["scopes"].split())}) for row in found
                }
                self._read_at = time.monotonic()
            return self._entries


def entries_of(path: Path) -> KeyEntries:
    """Return the entries of the run with the key file `path`, wherever they are."""
    database = open_run(path.absolute().parent.parent)
    return KeyFile(path) if database is None else KeyRows(database)
