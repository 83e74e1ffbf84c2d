"""API keys with scopes and a tenant, stored as hashes.

A key is 32 random bytes, so a plain SHA-256 cannot be reversed by guessing and no slow hash is needed. The file is read
again when it changes: a revoked key is refused at once. A run that has had a key keeps requiring one, even if the key
file is lost, until `open` is called: a second file, `keys.required`, records this.
"""

from __future__ import annotations

import hashlib
import os
import secrets
import threading
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal, get_args

from proper.errors import InputError, ProperError
from proper.files import locked, private_folder, read_json, write_json, write_text
from proper.run_folder import RunFolder

Scope = Literal["generate", "write", "admin"]
SCOPES: tuple[Scope, ...] = get_args(Scope)
_RUN = RunFolder(Path())
FILE = _RUN.keys
"""Path of the key file in a run folder."""


@dataclass(frozen=True)
class Principal:
    """The owner of a key.

    Attributes:
        id: the beginning of the key's hash; identifies the key without revealing it.
        tenant: the tenant whose users the key may name.
        scopes: what the key may do.
    """

    id: str
    tenant: str
    scopes: tuple[Scope, ...]


ANONYMOUS = Principal("", "", SCOPES)
"""Principal of every request to a server without keys, which listens on loopback only."""


@dataclass(frozen=True)
class _Entry:
    id: str
    sha256: str
    tenant: str
    scopes: tuple[Scope, ...]
    created: int


class DamagedKeysError(ProperError):
    """The key file cannot be read, so no request can be authenticated."""


class Keys:
    """The keys in the file at `path`, which need not exist."""

    def __init__(self, path: Path) -> None:
        self.path, self._marker = path, path.with_name(_RUN.keys_required.name)
        self._seen: tuple[int, int, int] | None = None
        self._entries: dict[str, _Entry] = {}
        self._lock = threading.Lock()

    def __len__(self) -> int:
        return len(self._read())

    @property
    def required(self) -> bool:
        """Whether a key is required: there is one, or there has been one since `open` was last called."""
        return self._marker.exists() or self.path.exists()

    def remember(self) -> None:
        """Write `keys.required` if there is a key file without it, made by an earlier version."""
        if self.path.exists() and not self._marker.exists() and os.access(self.path.parent, os.W_OK):
            self._mark()

    def open(self) -> None:
        """Stop requiring a key for requests from the same machine.

        Raises:
            InputError: there are keys left.
            DamagedKeysError: the key file cannot be read.
        """
        with self._changing():
            if self._read():
                raise InputError(f"{self.path}: there are keys; revoke them first")
            self.path.unlink(missing_ok=True)
            self._marker.unlink(missing_ok=True)

    def principal(self, key: str) -> Principal | None:
        """Return the principal of a key; None if the key is unknown."""
        # Not a timing leak: the look-up is by hash, so its duration depends on hashes only.
        entry = self._read().get(hashlib.sha256(key.encode()).hexdigest())
        return None if entry is None else Principal(entry.id, entry.tenant, entry.scopes)

    def principals(self) -> list[Principal]:
        """Return the principals of all keys."""
        return [Principal(entry.id, entry.tenant, entry.scopes) for entry in self._read().values()]

    def add(self, tenant: str, scopes: Iterable[Scope]) -> str:
        """Make a key and return it; it cannot be read again later.

        Raises:
            InputError: a scope is unknown, or there is none.
        """
        wanted = set(scopes)
        if not wanted or wanted - set(SCOPES):
            raise InputError(f"scopes: choose from {', '.join(SCOPES)}")
        chosen = tuple(scope for scope in SCOPES if scope in wanted)
        key = f"proper-{secrets.token_urlsafe(32)}"
        digest = hashlib.sha256(key.encode()).hexdigest()
        with self._changing():
            self._mark()
            self._write([*self._read().values(), _Entry(digest[:12], digest, tenant, chosen, int(time.time()))])
        return key

    def revoke(self, key_id: str) -> None:
        """Revoke a key.

        Raises:
            InputError: there is no key with this id.
        """
        with self._changing():
            entries = list(self._read().values())
            left = [entry for entry in entries if entry.id != key_id]
            if len(left) == len(entries):
                raise InputError(f"{self.path}: there is no key {key_id!r}")
            self._mark()
            self._write(left)

    @contextmanager
    def _changing(self) -> Iterator[None]:
        """Hold the file lock, so that no other process or thread changes the file between read and write.

        Raises:
            ProperError: the folder cannot be written.
        """
        try:
            private_folder(self.path.parent)
            with locked(self.path.with_name(_RUN.keys_lock.name)):
                yield
        except OSError as error:
            raise ProperError(f"{self.path}: keys cannot be changed: {error.strerror or error}") from error

    def _mark(self) -> None:
        if not self._marker.exists():
            write_text(self._marker, "This run has had API keys: requests without a valid key are refused.\n")

    def _write(self, entries: list[_Entry]) -> None:
        write_json(self.path, {"schema": 1, "keys": [asdict(entry) for entry in entries]})

    def _read(self) -> dict[str, _Entry]:
        """Return the entries by hash.

        Raises:
            DamagedKeysError: the file cannot be read.
        """
        try:
            found = os.stat(self.path)
        except FileNotFoundError:
            return {}
        stamp = (found.st_mtime_ns, found.st_ino, found.st_size)
        with self._lock:
            if stamp != self._seen:
                self._entries, self._seen = {entry.sha256: entry for entry in _entries(self.path)}, stamp
            return self._entries


def _entries(path: Path) -> list[_Entry]:
    try:
        return [_Entry(**{**entry, "scopes": tuple(entry["scopes"])}) for entry in read_json(path)["keys"]]
    except (ProperError, OSError, KeyError, TypeError, ValueError) as error:
        reason = str(error) if isinstance(error, ProperError) else f"{path}: not a file of keys: {error!r}"
        raise DamagedKeysError(f"{reason}; restore a copy of it, or remove it and add keys again") from error
