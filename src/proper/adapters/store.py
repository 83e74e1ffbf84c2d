"""Versioned adapter store: one record per user (tier, embedding, adapter), an SQLite manifest and blob files.

    users.sqlite   the manifest: tiers, versions, embeddings, metadata (`facts`), checksums, and the byte ranges
    blobs/         N.shard: small adapters packed together;  HEX.safetensors: a large adapter each
    cache/         with adapters in a bucket instead of blobs/ (`storage_setting`): those that were read lately

A put is a two-phase write: bytes first, then the manifest rows in one transaction, so a kill at any moment leaves the
old state or the new one. Bytes that a commit drops (a deleted user, a version beyond `keep`) are scheduled for erasure
in that commit and wiped after it. Commits are serialized; readers never wait. An adapter is a mapping of tensors: the
store knows nothing about models.
"""

from __future__ import annotations

import json
import logging
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from functools import lru_cache
from pathlib import Path
from typing import Any, TypeVar

import torch

from proper.adapters.manifest import Manifest, ManifestRow, key_of, user_of
from proper.adapters.quantization import decode
from proper.adapters.records import (
    BOUND_AT,
    Prepared,
    commit,
    head_of,
    is_for_bound,
    prepare,
    restored,
    tier_of,
    vector,
    version_of,
)
from proper.adapters.records import Head as Head
from proper.adapters.records import UserRecord as UserRecord
from proper.adapters.records import Version as Version
from proper.adapters.serialization import TensorSpec, unpack
from proper.adapters.shards import BlobError
from proper.adapters.storage_setting import blobs_of, open_storage
from proper.adapters.tombstones import Tombstones
from proper.errors import ChangedError, NoVersionError, StoreError
from proper.files import locked, private_folder
from proper.run_folder import Tier, UsersFolder
from proper.sqlite_files import read_only_error

logger = logging.getLogger(__name__)

T = TypeVar("T")
DEFAULT_TENANT = ""
"""The tenant of a run's own users: those of its data."""
KEEP, WAIT_SECONDS, FILE_BYTES, SHARD_BYTES = 2, 60.0, 256 << 10, 64 << 20
"""Defaults of the arguments of `AdapterStore` with these names."""


class AdapterStore:
    """A folder with a manifest and blobs, created if it does not exist.

    Args:
        folder: the folder.
        tenant: the tenant whose users are accessed; tenants do not see each other.
        keep: number of versions kept per user, the current one included.
        file_bytes: an adapter larger than this gets a file of its own.
        shard_bytes: size at which a shard is full.
        wait_seconds: how long to wait for another process that writes.
    """

    def __init__(
        self,
        folder: Path,
        tenant: str = DEFAULT_TENANT,
        *,
        keep: int = KEEP,
        file_bytes: int = FILE_BYTES,
        shard_bytes: int = SHARD_BYTES,
        wait_seconds: float = WAIT_SECONDS,
    ) -> None:
        if keep < 1:
            raise ValueError("keep: the current version is always kept")
        self.folder, self.tenant, self.keep, self.file_bytes = folder, tenant, keep, file_bytes
        self.paths = UsersFolder(folder)
        self.tombstones = Tombstones(folder)
        self.manifest = Manifest(self.paths.manifest, wait_seconds, self._require_no_blobs)
        self.shards = open_storage(self.paths, self.manifest)
        self.writer = self.shards.writer(shard_bytes)
        self._appending = threading.Lock()
        # The layout of a given number never changes.
        self._spec = lru_cache(maxsize=256)(self._read_spec)
        if not self.manifest.read_only:
            private_folder(folder)
            self.shards.make()
            with suppress(StoreError, OSError):  # what cannot be erased now stays scheduled; a reader needs no warning
                self.shards.erase(thorough=False)

    def _require_no_blobs(self) -> None:
        """Refuse to create a manifest beside existing blobs, which would all become orphans."""
        if (place := blobs_of(self.paths)) is not None:
            raise StoreError(f"{self.paths.manifest}: is missing, but {place} holds adapters; restore a backup")

    def close(self) -> None:
        """Close the manifest and release the shard that was written to."""
        self.writer.close()
        self.manifest.close()

    def bind(self, metadata: Mapping[str, str]) -> None:
        """Bind the store to a backbone and groups (by their hashes), or check that it is bound to these.

        Raises:
            StoreError: the store is bound to others; names the value that differs.
        """
        self.require(metadata)
        with self.manifest.transaction():
            self.manifest.bind(metadata)

    def require(self, metadata: Mapping[str, str]) -> None:
        """Check that the store is not bound to values other than these; does not bind it.

        Raises:
            StoreError: the store is bound to others; names the value that differs.
        """
        for key, found in self._bound_to_others(metadata):
            raise StoreError(f"{self.folder}: these adapters belong to another {key} ({found}, not {metadata[key]})")

    def _bound_to_others(self, metadata: Mapping[str, str]) -> Iterator[tuple[str, str]]:
        """Yield the keys to whose values the store is not bound, and those that it is bound to."""
        bound = self.manifest.metadata()
        yield from ((key, bound[key]) for key, value in metadata.items() if bound.get(key, value) != value)

    def put(
        self,
        records: Iterable[UserRecord],
        *,
        bound: Mapping[str, str] | None = None,
        seen: Mapping[str, int] | None = None,
        only_new: bool = False,
        only_if_bound: Mapping[str, str] | None = None,
    ) -> None:
        """Add users or new versions of them and, if given, bind the store to new values, all in one transaction.

        The iterable must not write to this store; a few hundred bytes of each record (and its embedding) stay in memory
        until the commit. Records of users who were deleted from the run are skipped.

        Args:
            records: the records.
            bound: the values to bind the store to.
            seen: the version of every user of the store that the caller has seen; read after `records`.
            only_new: whether records of users whom the store has by then are skipped, too.
            only_if_bound: values that the records were made for, of those that the store is bound to.

        Raises:
            ChangedError: a user has another version than in `seen`, or is not in it; or the store is bound to others
                than `only_if_bound` by now.
            StoreError: a write fails, or a record's numbers are not finite or absurdly large (names user and tensor);
                no record is changed.
        """
        with self.appending():
            try:
                prepared = [prepare(record, self.writer, self.file_bytes) for record in records]
                self.writer.sync()
                with self.manifest.transaction():
                    self._require_unchanged(seen, only_if_bound)
                    self.manifest.bind({**bound, BOUND_AT: str(int(time.time()))} if bound else {})
                    kept = list(self._wanted(prepared, only_new))
                    commit(self.manifest, self.tenant, kept, self.writer.sizes(), self.keep)
            except BaseException as error:
                with suppress(StoreError, OSError):  # bytes left behind are reported by `check` as orphans
                    self.writer.undo()
                if not isinstance(error, OSError):
                    raise
                raise StoreError(f"{self.shards.name}: cannot be written: {error.strerror or error}") from error
            self.writer.done()
        if len(kept) < len(prepared):
            self.shards.erase()
        else:
            self._tidy()

    def _require_unchanged(self, seen: Mapping[str, int] | None, bound: Mapping[str, str] | None) -> None:
        """Raise ChangedError if users have other versions than in `seen`, or the store is bound to others."""
        if seen is not None and any(seen.get(user) != head.version for user, head, _ in self.heads()):
            raise ChangedError(f"{self.folder}: users were changed meanwhile")
        for key, found in self._bound_to_others(bound or {}):
            raise ChangedError(f"{self.folder}: belongs to other {key} meanwhile ({found}); try again")

    def _tidy(self) -> None:
        """Erase what may wait after a commit, which stands if that fails: the bytes stay scheduled."""
        try:
            self.shards.erase(thorough=False)
        except (StoreError, OSError) as error:
            logger.warning(f"proper: bytes of replaced versions are erased later: {error}")

    def _wanted(self, prepared: Sequence[Prepared], only_new: bool) -> Iterator[Prepared]:
        """Skip deleted users and, if `only_new`, known ones; schedule their bytes for erasure (in a transaction)."""
        # A deletion writes its tombstone before it removes records, so this check cannot miss a running deletion.
        deleted = self.tombstones.predicate(self.tenant, len(prepared))
        for new in prepared:
            known = only_new and self.manifest.head(self.tenant, new.user) is not None
            if not known and not deleted(user_of(new.user)):
                yield new
            elif new.place is not None:
                blob, offset, length = new.place
                self.manifest.erase_later(blob, offset if blob.endswith(".shard") else None, length)

    @contextmanager
    def appending(self) -> Iterator[None]:
        """Hold `writer` exclusively."""
        with self._appending, self.writing():
            yield

    @contextmanager
    def writing(self, exclusive: bool = False) -> Iterator[None]:
        """Hold the lock for writing blobs whose rows are not committed yet: shared, or exclusively."""
        if self.manifest.read_only:
            raise read_only_error(self.manifest.path)
        with locked(self.paths.lock, shared=not exclusive):
            yield

    def get(self, user: str, version: int | None = None, *, coded: bool = False) -> UserRecord | None:
        """Return a user's record, or None for a user (or version) the store does not know.

        `version` None takes the current one; `coded` returns the adapter in its storage form, for another store.

        Raises:
            StoreError: the adapter is missing or damaged; names user and file.
        """
        return self.read(user, lambda row: self.record(user, row, coded), version)

    def read(self, user: str, take: Callable[[ManifestRow], T], version: int | None = None) -> T | None:
        """Return `take(row)` for a user's manifest row, or None for a user (or version) the store does not know.

        If `take` finds damaged bytes, the row is looked up again: they may have been replaced or moved meanwhile.

        Raises:
            StoreError: the adapter is missing or damaged; names user and file.
        """
        row = self._row(user, version)
        while row is not None:
            try:
                return take(row)
            except BlobError as error:
                again = self._row(user, version)
                if again is not None and (again.version, again.place) == (row.version, row.place):
                    path = self.shards.where(str(row.blob))
                    raise StoreError(f"{path}: the adapter of user {user!r} is missing or damaged: {error}") from error
                row = again
        return None

    def head(self, user: str) -> Head | None:
        """Return a user's current record without reading the adapter, or None for an unknown user."""
        row = self._row(user, None)
        return None if row is None else head_of(row)

    def versions(self, user: str) -> list[Version]:
        """Return a user's stored versions, newest first; empty for an unknown user."""
        return [version_of(row) for row in self.manifest.versions(self.tenant, key_of(user))]

    def rollback(self, user: str, to: int | None = None) -> int:
        """Make an older version current again, and return the new version's number.

        The rollback adds a new version with the old one's content, so that numbers only increase and caches notice; the
        version it replaces stays as the previous one. Rolling back twice restores the original state. The new version's
        metadata names both versions (`records.restored`). `to` None takes the version before the current one.
        A version from before the groups were refreshed fits other groups, and is none to go back to.

        Raises:
            NoVersionError: there is no such version.
            StoreError: the new version cannot be written.
        """
        with self.manifest.transaction():
            versions = self.manifest.versions(self.tenant, key_of(user))
            bound = self.manifest.metadata()
            chosen = [row for row in versions[1:] if to in (None, row.version) and is_for_bound(row, bound)]
            if not chosen:
                wanted = "an earlier version" if to is None else f"a version {to} to go back to"
                since = " that was made since the groups were refreshed" if BOUND_AT in bound else ""
                raise NoVersionError(f"{self.folder}: user {user!r} does not have {wanted}{since}")
            version = self.manifest.add(restored(chosen[0], versions[0], "rollback"))
            self.manifest.prune(self.tenant, key_of(user), max(self.keep, 2))
        self._tidy()
        return version

    def users(self, after: str | None = None) -> Iterator[tuple[str, Tier]]:
        """Yield every user and their tier, ordered by user, from the beginning or `after` a user."""
        for row in self.manifest.heads(self.tenant, None if after is None else key_of(after)):
            yield user_of(row.user), tier_of(row)

    def metadata(self) -> Iterator[tuple[str, Tier, dict[str, Any], int]]:
        """Yield user, tier, metadata and size in bytes of every current record without reading adapters."""
        for row in self.manifest.heads(self.tenant):
            size = row.length + len(row.embedding)
            yield user_of(row.user), tier_of(row), json.loads(row.facts), size

    def heads(self, after: str | None = None) -> Iterator[tuple[str, Head, dict[str, Any]]]:
        """Yield user, head and metadata of every current record without reading adapters, in the order of `users`."""
        for row in self.manifest.heads(self.tenant, None if after is None else key_of(after)):
            yield user_of(row.user), head_of(row), json.loads(row.facts)

    def delete(self, user: str) -> bool:
        """Delete a user with all versions; return whether the user existed. Wipes as `delete_many` does."""
        return self.delete_many([user]) == 1

    def delete_many(self, users: Iterable[str]) -> int:
        """Delete these users with all versions in one transaction; return how many existed.

        Adapters are wiped before this returns; embeddings stay in the write-ahead log while another process reads.
        """
        found = 0
        with self.manifest.transaction():
            for user in users:
                found += self.manifest.drop_user(self.tenant, key_of(user))
        self.shards.erase()
        if found:
            self.wipe(0)
        return found

    def wipe(self, patience: float, trace: str = "") -> bool:
        """Wipe data of deleted users; return False if another process reads for longer than `patience` (seconds).

        `trace`: as of `Database.wipe`.
        """
        self.shards.erase()
        return self.manifest.wipe(patience, trace)

    def record(self, user: str, row: ManifestRow, coded: bool = False) -> UserRecord:
        """Return the record of a manifest row; `coded` as in `get`.

        Raises:
            BlobError: the adapter's bytes are missing or changed; `read` handles this.
        """
        adapter = None
        if row.place is not None:
            data = torch.empty(row.length, dtype=torch.uint8)
            self.shards.fill(row, data.numpy().data)
            stored = unpack(self.spec(row), data)
            adapter = stored if coded else decode(stored)
        return UserRecord(user, tier_of(row), vector(row.embedding), adapter, json.loads(row.facts))

    def spec(self, row: ManifestRow) -> TensorSpec:
        """Return the tensor spec of a row's adapter."""
        return self._spec(row.layout)

    def _row(self, user: str, version: int | None) -> ManifestRow | None:
        if version is None:
            return self.manifest.head(self.tenant, key_of(user))
        rows = self.manifest.versions(self.tenant, key_of(user))
        return next((row for row in rows if row.version == version), None)

    def _read_spec(self, number: int | None) -> TensorSpec:
        text = None if number is None else self.manifest.layout(number)
        if text is None:
            raise StoreError(f"{self.manifest.path}: layout {number} is missing")
        return TensorSpec.parse(text)
