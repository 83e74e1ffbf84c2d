"""API keys: who may do what, for which tenant. Only hashes are kept.

A key is 32 random bytes, so a plain SHA-256 of it cannot be guessed back and needs no slow hash. The file is read
again when it changes: a revoked key stops at once. Knows nothing about HTTP.
"""

from __future__ import annotations

import hashlib
import os
import secrets
import threading
import time
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal, get_args

from proper.errors import InputError
from proper.files import read_json, write_json

Scope = Literal["generate", "write", "admin"]
SCOPES: tuple[Scope, ...] = get_args(Scope)
FILE = Path("serving", "keys.json")
"""Where a run folder keeps them."""


@dataclass(frozen=True)
class Principal:
    """Who asks.

    Attributes:
        id: the beginning of the key's hash; names the key without giving it away.
        tenant: whose users it may name.
        scopes: what it may do.
    """

    id: str
    tenant: str
    scopes: tuple[Scope, ...]


ANYBODY = Principal("", "", SCOPES)
"""Whoever reaches a server without keys, which listens to its own machine only."""


@dataclass(frozen=True)
class _Entry:
    id: str
    sha256: str
    tenant: str
    scopes: tuple[Scope, ...]
    created: int


class Keys:
    """The keys of the file at `path`, which need not be there."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._seen: tuple[int, int, int] | None = None
        self._entries: dict[str, _Entry] = {}
        self._lock = threading.Lock()

    def __len__(self) -> int:
        return len(self._read())

    def principal(self, key: str) -> Principal | None:
        """Return who has this key, or None."""
        # A dict look-up of a hash tells by its time at most something about hashes.
        entry = self._read().get(hashlib.sha256(key.encode()).hexdigest())
        return None if entry is None else Principal(entry.id, entry.tenant, entry.scopes)

    def principals(self) -> list[Principal]:
        """Return all."""
        return [Principal(entry.id, entry.tenant, entry.scopes) for entry in self._read().values()]

    def add(self, tenant: str, scopes: Iterable[Scope]) -> str:
        """Make a key and return it; nobody can read it again.

        Raises:
            InputError: a scope is unknown, or there is none.
        """
        wanted = set(scopes)
        if not wanted or wanted - set(SCOPES):
            raise InputError(f"scopes: choose from {', '.join(SCOPES)}")
        chosen = tuple(scope for scope in SCOPES if scope in wanted)
        key = f"proper-{secrets.token_urlsafe(32)}"
        digest = hashlib.sha256(key.encode()).hexdigest()
        self._write([*self._read().values(), _Entry(digest[:12], digest, tenant, chosen, int(time.time()))])
        return key

    def revoke(self, key_id: str) -> None:
        """Take a key back.

        Raises:
            InputError: there is none with this id.
        """
        entries = list(self._read().values())
        left = [entry for entry in entries if entry.id != key_id]
        if len(left) == len(entries):
            raise InputError(f"{self.path}: there is no key {key_id!r}")
        self._write(left)

    def _write(self, entries: list[_Entry]) -> None:
        write_json(self.path, {"schema": 1, "keys": [asdict(entry) for entry in entries]})
        self.path.chmod(0o600)

    def _read(self) -> dict[str, _Entry]:
        try:
            found = os.stat(self.path)
        except FileNotFoundError:
            return {}
        stamp = (found.st_mtime_ns, found.st_ino, found.st_size)
        with self._lock:
            if stamp != self._seen:
                raw = read_json(self.path)
                entries = [_Entry(**{**entry, "scopes": tuple(entry["scopes"])}) for entry in raw["keys"]]
                self._entries, self._seen = {entry.sha256: entry for entry in entries}, stamp
            return self._entries
