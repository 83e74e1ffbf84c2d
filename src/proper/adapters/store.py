"""The store of everything personal: one record per user, in a SQLite manifest with adapters in files beside it.

The manifest holds the user's tier, embedding and facts (a few hundred bytes); the adapter, megabytes on a large
backbone, is one safetensors file whose name is a hash, so that a user id is never a path. A record is replaced as a
whole: the new file is written first, then one transaction points to it, then the old file goes.
Knows nothing about models: an adapter is a mapping of tensors.
"""

from __future__ import annotations

import hashlib
import json
import sqlite3
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from proper.errors import StoreError
from proper.files import atomic_path, hash_file

Tier = Literal["groups", "users"]
DEFAULT_TENANT = ""

_TABLES = """
CREATE TABLE IF NOT EXISTS facts (key TEXT PRIMARY KEY, value TEXT NOT NULL) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS users (
    tenant TEXT NOT NULL, user TEXT NOT NULL, version INTEGER NOT NULL, tier TEXT NOT NULL, embedding BLOB NOT NULL,
    blob TEXT, sha256 TEXT, bytes INTEGER NOT NULL, facts TEXT NOT NULL, PRIMARY KEY (tenant, user)) WITHOUT ROWID;
"""


@dataclass(frozen=True)
class UserRecord:
    """One user's own state.

    Attributes:
        user: any string.
        tier: "groups" (embedding only) or "users" (embedding and adapter).
        embedding: e_u (D,), fp32.
        adapter: stacked tensors, as `layers.bank.Layout` names them; None on the group tier.
        facts: JSON-able facts about how it came about.
    """

    user: str
    tier: Tier
    embedding: Tensor
    adapter: Mapping[str, Tensor] | None = None
    facts: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Head:
    """A user's record without the adapter; every replacement has a new version."""

    version: int
    tier: Tier
    embedding: Tensor


class AdapterStore:
    """A folder with the manifest `users.sqlite` and one file per adapter in `blobs/`."""

    def __init__(self, folder: Path, tenant: str = DEFAULT_TENANT) -> None:
        self.folder, self.tenant = folder, tenant
        (folder / "blobs").mkdir(parents=True, exist_ok=True)
        try:
            self._db = sqlite3.connect(folder / "users.sqlite", isolation_level=None, check_same_thread=False)
            self._db.execute("PRAGMA journal_mode=WAL")
            self._db.execute("PRAGMA synchronous=NORMAL")
            self._db.executescript(_TABLES)
        except sqlite3.Error as error:
            raise StoreError(f"{folder / 'users.sqlite'}: {error}") from error

    def close(self) -> None:
        """Close the manifest."""
        self._db.close()

    def bind(self, facts: Mapping[str, str]) -> None:
        """Tie the store to a backbone and groups (by their hashes), or check that it is tied to these.

        Raises:
            StoreError: its adapters belong to others; says which fact differs.
        """
        held = dict(self._db.execute("SELECT key, value FROM facts"))
        for key, value in facts.items():
            if key in held and held[key] != value:
                raise StoreError(f"{self.folder}: these adapters belong to another {key} ({held[key]}, not {value})")
        with self._write():
            self._db.executemany("INSERT OR REPLACE INTO facts VALUES (?, ?)", facts.items())

    def put(self, records: Iterable[UserRecord]) -> None:
        """Add or replace users, all in one transaction.

        Raises:
            StoreError: something cannot be written; no record is changed.
        """
        rows: list[tuple[Any, ...]] = []
        old: list[str] = []
        try:
            for record in records:
                rows.append(self._row(record, old))
            with self._write():
                self._db.executemany("INSERT OR REPLACE INTO users VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?)", rows)
        except BaseException:
            self._remove(row[5] for row in rows)
            raise
        self._remove(old)

    def _row(self, record: UserRecord, old: list[str]) -> tuple[Any, ...]:
        """Write a record's adapter; return its manifest row, and note in `old` the file that it replaces."""
        held = self._db.execute(
            "SELECT version, blob FROM users WHERE tenant = ? AND user = ?", (self.tenant, record.user)
        ).fetchone()
        version = held[0] + 1 if held else 1
        old += [held[1]] if held and held[1] else []
        blob, digest, size = self._write_blob(record, version)
        embedding = record.embedding.detach().float().cpu().numpy().tobytes()
        facts = json.dumps(dict(record.facts), ensure_ascii=False)
        return (self.tenant, record.user, version, record.tier, embedding, blob, digest, size, facts)

    def _remove(self, blobs: Iterable[str | None]) -> None:
        for name in blobs:
            if name is not None:
                (self.folder / "blobs" / name).unlink(missing_ok=True)

    def get(self, user: str) -> UserRecord | None:
        """Return a user's record, or None for a user the store does not know.

        Raises:
            StoreError: the adapter's file is missing or damaged; names user and file.
        """
        row = self._db.execute(
            "SELECT tier, embedding, blob, facts FROM users WHERE tenant = ? AND user = ?", (self.tenant, user)
        ).fetchone()
        if row is None:
            return None
        tier, embedding, blob, facts = row
        adapter = self._read_blob(user, blob) if blob else None
        vector = torch.frombuffer(bytearray(embedding), dtype=torch.float32)
        return UserRecord(user, tier, vector, adapter, json.loads(facts))

    def head(self, user: str) -> Head | None:
        """Return what a user's record says without reading the adapter, or None for an unknown user."""
        row = self._db.execute(
            "SELECT version, tier, embedding FROM users WHERE tenant = ? AND user = ?", (self.tenant, user)
        ).fetchone()
        if row is None:
            return None
        return Head(row[0], row[1], torch.frombuffer(bytearray(row[2]), dtype=torch.float32))

    def users(self) -> Iterator[tuple[str, Tier]]:
        """Yield every user and their tier, ordered by user."""
        yield from self._db.execute("SELECT user, tier FROM users WHERE tenant = ? ORDER BY user", (self.tenant,))

    def facts(self) -> Iterator[tuple[str, Tier, dict[str, Any], int]]:
        """Yield user, tier, facts and bytes of every record without reading adapters."""
        query = "SELECT user, tier, facts, bytes + length(embedding) FROM users WHERE tenant = ? ORDER BY user"
        for user, tier, facts, size in self._db.execute(query, (self.tenant,)):
            yield user, tier, json.loads(facts), size

    def delete(self, user: str) -> bool:
        """Remove a user's record and adapter; return whether there was one."""
        where = (self.tenant, user)
        row = self._db.execute("SELECT blob FROM users WHERE tenant = ? AND user = ?", where).fetchone()
        if row is None:
            return False
        with self._write():
            self._db.execute("DELETE FROM users WHERE tenant = ? AND user = ?", where)
        if row[0]:
            (self.folder / "blobs" / row[0]).unlink(missing_ok=True)
        return True

    def _write_blob(self, record: UserRecord, version: int) -> tuple[str | None, str | None, int]:
        if record.adapter is None:
            return None, None, 0
        key = hashlib.sha256(f"{self.tenant}\0{record.user}".encode()).hexdigest()[:32]
        path = self.folder / "blobs" / f"{key}-{version}.safetensors"
        tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in record.adapter.items()}
        with atomic_path(path) as temporary:
            save_file(tensors, temporary)
        return path.name, hash_file(path), path.stat().st_size

    def _read_blob(self, user: str, name: str) -> dict[str, Tensor]:
        path = self.folder / "blobs" / name
        try:
            return load_file(path)
        except (OSError, SafetensorError) as error:
            raise StoreError(f"{path}: the adapter of user {user!r} is missing or damaged: {error}") from error

    def _write(self) -> _Transaction:
        return _Transaction(self._db)


class _Transaction:
    """BEGIN IMMEDIATE ... COMMIT, rolled back on any error."""

    def __init__(self, db: sqlite3.Connection) -> None:
        self._db = db

    def __enter__(self) -> None:
        try:
            self._db.execute("BEGIN IMMEDIATE")
        except sqlite3.Error as error:
            raise StoreError(f"the store cannot be written: {error}") from error

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        try:
            self._db.execute("ROLLBACK" if kind else "COMMIT")
        except sqlite3.Error as error:
            raise StoreError(f"the store cannot be written: {error}") from error
