"""Tombstones of deleted users, each the name of a keyed hash, so that no component adds the user again.

    RUN/tombstones/key       32 random bytes, generated for this run
    RUN/tombstones/HASH      blake2b of tenant and user under that key; an empty file

A run whose state is in PostgreSQL has them in its tables `settings` and `tombstones`.

No id can be read from a tombstone. A reader of the folder can test whether a guessed id was deleted, which cannot be
avoided. `AdapterStore.put`, the interaction log, imports and data preparation check tombstones; only an explicit
enrolment, or an import that requests it, lifts one.
"""

from __future__ import annotations

import json
import os
import re
import secrets
from collections.abc import Callable, Collection, Iterator
from contextlib import closing, contextmanager
from functools import partial
from hashlib import blake2b
from pathlib import Path
from typing import Protocol

from sqlalchemy import bindparam, delete, select

from proper.adapters.manifest import key_of
from proper.adapters.shards import sync_folder
from proper.databases.location import location_of
from proper.databases.shared import SharedDatabase, open_run
from proper.databases.statements import Statement, row_of
from proper.databases.tables import SETTINGS, TOMBSTONES
from proper.errors import StoreError
from proper.run_folder import RunFolder

_MANY = 32  # users from which on all tombstones are read at once, instead of one by one
_KEY_BYTES = 32


class Tombstones:
    """The tombstones of the run that a store's folder (`RUN/users`) belongs to."""

    def __init__(self, users: Path) -> None:
        home = RunFolder(users.absolute().parent).home
        in_rows = location_of(home.users.path) is not None
        self._names: _Names = _Rows(home.path) if in_rows else _Files(home.tombstones)

    def has(self, tenant: str, user: str) -> bool:
        """Return whether this user was deleted and not enrolled again."""
        key = self._names.key()
        return key is not None and self._names.has(_name(key, tenant, user))

    def of_tenant(self, tenant: str) -> Callable[[str], bool] | None:
        """Return a fast predicate for many users of a tenant: whether a user was deleted; None if no user ever was."""
        key = self._names.key()
        if key is None:
            return None
        names = self._names.all()
        return lambda user: _name(key, tenant, user) in names

    def predicate(self, tenant: str, users: int) -> Callable[[str], bool]:
        """Return whether a user was deleted, as a function for about so many `users` of a tenant."""
        found = self.of_tenant(tenant) if users > _MANY else None
        return found or partial(self.has, tenant)

    def add(self, tenant: str, user: str) -> None:
        """Add a user's tombstone; it is on the disk before this returns.

        Raises:
            StoreError: the tombstone cannot be written.
        """
        key = self._names.key() or self._names.new_key(secrets.token_bytes(_KEY_BYTES))
        self._names.add(_name(key, tenant, user))

    def lift(self, tenant: str, user: str) -> None:
        """Remove a user's tombstone: the user is enrolled again."""
        key = self._names.key()
        if key is not None:
            self._names.remove(_name(key, tenant, user))

    @contextmanager
    def lifted(self, tenant: str, users: Collection[str]) -> Iterator[None]:
        """Remove users' tombstones; those that were there come back if the block, which adds the users, fails."""
        deleted = self.predicate(tenant, len(users))
        gone = [user for user in users if deleted(user)]
        for user in gone:
            self.lift(tenant, user)
        try:
            yield
        except BaseException:
            for user in gone:
                self.add(tenant, user)
            raise

    def copy_to(self, other: Tombstones) -> None:
        """Copy key and tombstones to a run that has none."""
        key = self._names.key()
        if key is not None:
            other._names.new_key(key)
            for name in self._names.all():
                other._names.add(name)


class _Names(Protocol):
    """Where the key and the names are."""

    def key(self) -> bytes | None: ...
    def new_key(self, key: bytes) -> bytes: ...
    def has(self, name: str) -> bool: ...
    def all(self) -> set[str]: ...
    def add(self, name: str) -> None: ...
    def remove(self, name: str) -> None: ...


class _Files:
    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def has(self, name: str) -> bool:
        return (self.folder / name).exists()

    def all(self) -> set[str]:
        return {path.name for path in self.folder.iterdir() if path.name != "key" and not path.name.startswith(".")}

    def add(self, name: str) -> None:
        try:
            (self.folder / name).touch(mode=0o600)
            sync_folder(self.folder)
        except OSError as error:
            raise self._unwritable(error) from error

    def remove(self, name: str) -> None:
        (self.folder / name).unlink(missing_ok=True)

    def key(self) -> bytes | None:
        """Return the key; None if no user was ever deleted.

        Raises:
            StoreError: the key is lost or damaged, so that deleted users cannot be recognized.
        """
        path = self.folder / "key"
        try:
            text = path.read_text(encoding="ascii", errors="replace").strip()
        except FileNotFoundError:
            if not self.folder.is_dir() or not self.all():
                return None
            if path.exists():  # created meanwhile by another process, which then added a name
                return self.key()
            text = ""
        if not re.fullmatch(f"[0-9a-f]{{{2 * _KEY_BYTES}}}", text):
            raise StoreError(
                f"{path}: is lost or damaged, so deleted users cannot be recognized; put back a copy, or remove "
                f"{self.folder} to forget it"
            )
        return bytes.fromhex(text)

    def new_key(self, key: bytes) -> bytes:
        """Create the key file; if another process created it first, use and return that key."""
        try:
            self._create_key(key)
        except OSError as error:
            raise self._unwritable(error) from error
        found = self.key()
        assert found is not None
        return found

    def _create_key(self, key: bytes) -> None:
        self.folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        draft = self.folder / f".{secrets.token_hex(8)}.tmp"
        handle = os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        try:
            os.write(handle, key.hex().encode("ascii"))
            os.fsync(handle)
            if not (self.folder / "key").exists():
                os.link(draft, self.folder / "key")
        except FileExistsError:
            pass  # created between the check and the link
        except FileNotFoundError:  # `files.sweep` removed the temporary file as left by a killed process
            self._create_key(key)
        finally:
            os.close(handle)
            draft.unlink(missing_ok=True)

    def _unwritable(self, error: OSError) -> StoreError:
        return StoreError(f"{self.folder}: cannot be written: {error.strerror or error}")


_KEY = {"name": "tombstones"}
_READ_KEY = Statement(lambda _: select(SETTINGS.c.value).where(SETTINGS.c.name == bindparam("name")))
_ADD_KEY = Statement(lambda insert: insert(SETTINGS).values(row_of(SETTINGS)).on_conflict_do_nothing())
_NAMED = TOMBSTONES.c.name == bindparam("name")
_HAS = Statement(lambda _: select(TOMBSTONES).where(_NAMED))
_ALL = Statement(lambda _: select(TOMBSTONES))
_ADD = Statement(lambda insert: insert(TOMBSTONES).values(row_of(TOMBSTONES)).on_conflict_do_nothing())
_REMOVE = Statement(lambda _: delete(TOMBSTONES).where(_NAMED))


class _Rows:
    """Opened for each call: the connections are those of the run's other databases."""

    def __init__(self, run: Path) -> None:
        self._run, self._key = run, b""

    def has(self, name: str) -> bool:
        with closing(self._open()) as database:
            return bool(database.read(_HAS, {"name": name}))

    def all(self) -> set[str]:
        with closing(self._open()) as database:
            return {name for (name,) in database.read(_ALL)}

    def add(self, name: str) -> None:
        with closing(self._open()) as database, database.transaction():
            database.write(_ADD, {"name": name})

    def remove(self, name: str) -> None:
        with closing(self._open()) as database, database.transaction():
            database.write(_REMOVE, {"name": name})

    def key(self) -> bytes | None:
        if not self._key:  # it never changes
            with closing(self._open()) as database:
                found = database.read(_READ_KEY, _KEY)
            self._key = bytes.fromhex(found[0][0]) if found else b""
        return self._key or None

    def new_key(self, key: bytes) -> bytes:
        with closing(self._open()) as database, database.transaction():
            database.write(_ADD_KEY, {**_KEY, "value": key.hex()})
        found = self.key()
        assert found is not None
        return found

    def _open(self) -> SharedDatabase:
        database = open_run(self._run)
        assert database is not None
        return database


def _name(key: bytes, tenant: str, user: str) -> str:
    content = json.dumps([tenant, key_of(user).hex()]).encode()
    return blake2b(content, key=key, digest_size=16).hexdigest()
