"""API keys with scopes and a tenant, stored as hashes.

A key is 32 random bytes, so a plain SHA-256 cannot be reversed by guessing and no slow hash is needed. The file is read
again when it changes: a revoked key is refused at once. A run that has had a key keeps requiring one, even if the key
file is lost, until `open` is called: a second file, `keys.required`, records this. A run whose state is in PostgreSQL
has its keys in the table `api_keys` instead, which a server reads again every second.
"""

from __future__ import annotations

import hashlib
import secrets
import time
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import get_args

from proper.errors import InputError
from proper.run_folder import RunFolder
from proper.serving.key_entries import DamagedKeysError as DamagedKeysError
from proper.serving.key_entries import KeyEntry, entries_of
from proper.serving.key_entries import Scope as Scope

SCOPES: tuple[Scope, ...] = get_args(Scope)
FILE = RunFolder(Path()).keys
"""Path of the key file in a run folder."""


@dataclass(frozen=True)
class Principal:
    """The owner of a key.

    Attributes:
        id: the beginning of the key's hash; identifies the key without revealing it.
        tenant: the tenant whose users the key may name.
        scopes: scopes of the key.
    """

    id: str
    tenant: str
    scopes: tuple[Scope, ...]


ANONYMOUS = Principal("", "", SCOPES)
"""Principal of every request to a server without keys, which listens on loopback only."""


class Keys:
    """The keys of a run, in the file at `path`, which need not exist, or in PostgreSQL; close after use."""

    def __init__(self, path: Path) -> None:
        self.path, self._held = path, entries_of(path)

    def __len__(self) -> int:
        return len(self._held.read())

    def close(self) -> None:
        """Close the connections to PostgreSQL, if the keys are there."""
        self._held.close()

    @property
    def required(self) -> bool:
        """Whether a key is required: there is one, or there has been one since `open` was last called."""
        return self._held.required()

    def remember(self) -> None:
        """Record that there has been a key, if a key file of an earlier version does not."""
        self._held.remember()

    def open(self) -> None:
        """Stop requiring a key for requests from the same machine.

        Raises:
            InputError: there are keys left.
            DamagedKeysError: the keys cannot be read.
        """
        with self._held.changing():
            if self._held.read():
                raise InputError(f"{self.path}: there are keys; revoke them first")
            self._held.clear()

    def principal(self, key: str) -> Principal | None:
        """Return the principal of a key; None if the key is unknown."""
        # Not a timing leak: the look-up is by hash, so its duration depends on hashes only.
        entry = self._held.read().get(hashlib.sha256(key.encode()).hexdigest())
        return None if entry is None else Principal(entry.id, entry.tenant, entry.scopes)

    def principals(self) -> list[Principal]:
        """Return the principals of all keys."""
        return [Principal(entry.id, entry.tenant, entry.scopes) for entry in self._held.read().values()]

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
        with self._held.changing():
            new = KeyEntry(digest[:12], digest, tenant, chosen, int(time.time()))
            self._held.write([*self._held.read().values(), new])
        return key

    def revoke(self, key_id: str) -> None:
        """Revoke a key.

        Raises:
            InputError: there is no key with this id.
        """
        with self._held.changing():
            entries = list(self._held.read().values())
            left = [entry for entry in entries if entry.id != key_id]
            if len(left) == len(entries):
                raise InputError(f"{self.path}: there is no key {key_id!r}")
            self._held.write(left)
