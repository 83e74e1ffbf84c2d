"""Tombstones of deleted users: one empty file each, named by a keyed hash, so that no component adds the user again.

    RUN/tombstones/key       32 random bytes, generated for this run
    RUN/tombstones/HASH      blake2b of tenant and user under that key

No id can be read from a tombstone. A reader of the folder can test whether a guessed id was deleted, which cannot be
avoided. `AdapterStore.put`, the interaction log, imports and data preparation check tombstones; only an explicit
enrolment, or an import that requests it, lifts one.
"""

from __future__ import annotations

import json
import os
import secrets
from collections.abc import Callable
from hashlib import blake2b
from pathlib import Path

from proper.adapters.manifest import key_of
from proper.adapters.shards import sync_folder
from proper.errors import StoreError
from proper.run_folder import RunFolder


class Tombstones:
    """The tombstones of the run that a store's folder (`RUN/users`) belongs to."""

    def __init__(self, users: Path) -> None:
        self.folder = RunFolder(users.absolute().parent).home.tombstones

    def has(self, tenant: str, user: str) -> bool:
        """Return whether this user was deleted and not enrolled again."""
        key = self._key()
        return key is not None and (self.folder / _name(key, tenant, user)).exists()

    def of_tenant(self, tenant: str) -> Callable[[str], bool] | None:
        """Return a fast predicate for many users of a tenant: whether a user was deleted; None if no user ever was."""
        key = self._key()
        if key is None:
            return None
        names = {path.name for path in self.folder.iterdir()}
        return lambda user: _name(key, tenant, user) in names

    def add(self, tenant: str, user: str) -> None:
        """Add a user's tombstone; it is on the disk before this returns.

        Raises:
            StoreError: the tombstone cannot be written.
        """
        try:
            key = self._key() or self._new_key()
            (self.folder / _name(key, tenant, user)).touch(mode=0o600)
            sync_folder(self.folder)
        except OSError as error:
            raise StoreError(f"{self.folder}: cannot be written: {error.strerror or error}") from error

    def lift(self, tenant: str, user: str) -> None:
        """Remove a user's tombstone: the user is enrolled again."""
        key = self._key()
        if key is not None:
            (self.folder / _name(key, tenant, user)).unlink(missing_ok=True)

    def _key(self) -> bytes | None:
        try:
            return bytes.fromhex((self.folder / "key").read_text(encoding="ascii"))
        except FileNotFoundError:
            return None

    def _new_key(self) -> bytes:
        """Create the key file atomically; if another process created it first, use that key."""
        self.folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        draft = self.folder / f".{secrets.token_hex(8)}.tmp"
        handle = os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        try:
            os.write(handle, secrets.token_hex(32).encode("ascii"))
            os.fsync(handle)
            if not (self.folder / "key").exists():
                os.link(draft, self.folder / "key")
        except FileExistsError:
            pass  # created between the check and the link
        except FileNotFoundError:  # `files.sweep` removed the temporary file as left by a killed process
            return self._new_key()
        finally:
            os.close(handle)
            draft.unlink(missing_ok=True)
        key = self._key()
        assert key is not None
        return key


def _name(key: bytes, tenant: str, user: str) -> str:
    content = json.dumps([tenant, key_of(user).hex()]).encode()
    return blake2b(content, key=key, digest_size=16).hexdigest()
