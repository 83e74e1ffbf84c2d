"""The manifest of the adapter store: a database with every user's record versions and the byte ranges of adapters.

The current version of a user is the one with the highest number. Long reads are paginated, so that no reader keeps an
old snapshot open and a deleted row leaves SQLite's write-ahead log at the next checkpoint.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from proper.adapters import manifest_statements as sql
from proper.databases.shared import Contents, SharedDatabase
from proper.databases.tables import STORE

_CONTENTS = Contents("store", 2, STORE)


class ByteRange(NamedTuple):
    """A byte range in a file of the store's `blobs/`."""

    blob: str
    offset: int
    length: int


class Erasure(NamedTuple):
    """Bytes to be wiped, because no record refers to them any more; offset is None for a whole file."""

    id: int
    blob: str
    offset: int | None
    length: int | None


class ManifestRow(NamedTuple):
    """One version of one user as a manifest row; the user's id is UTF-8 with lone surrogates allowed."""

    tenant: str
    user: bytes
    version: int
    parent: int | None
    tier: str
    written: int
    facts: str
    layout: int | None
    blob: str | None
    offset: int | None
    length: int
    xxh3: bytes | None
    sha256: bytes | None
    embedding: bytes

    @property
    def place(self) -> ByteRange | None:
        """The byte range of the adapter; None without one."""
        return None if self.blob is None else ByteRange(self.blob, self.offset or 0, self.length)


def key_of(user: str) -> bytes:
    """Return the bytes that represent a user id; defined for every Python string."""
    return user.encode("utf-8", "surrogatepass")


def user_of(key: bytes) -> str:
    """Return the user id of a key; the inverse of `key_of`."""
    return key.decode("utf-8", "surrogatepass")


def shard_name(number: int) -> str:
    """Return the file name of a shard."""
    return f"{number}.shard"


def shard_number(blob: str) -> int:
    """Return the number of a shard's file name; the inverse of `shard_name`."""
    return int(blob.partition(".")[0])


class Manifest(SharedDatabase):
    """The manifest of the SQLite file at `path`, made if it does not exist.

    Args:
        path: the file.
        wait_seconds: how long to wait for another process that writes.
        may_make: called before a new file is made; raises if the file must have been lost.

    Raises:
        StoreError: the file is damaged or lost.
    """

    def __init__(self, path: Path, wait_seconds: float, may_make: Callable[[], None] = lambda: None) -> None:
        super().__init__(path, _CONTENTS, wait_seconds, may_make, reads_wait=False)

    def metadata(self) -> dict[str, str]:
        """Return the metadata that the store is bound to (see `AdapterStore.bind`)."""
        return dict(self.read(sql.LIST_METADATA))

    def bind(self, metadata: Mapping[str, str]) -> None:
        """Write the metadata that the store is bound to (inside a transaction)."""
        for key, value in metadata.items():
            self.write(sql.BIND, {"key": key, "value": value})

    def head(self, tenant: str, user: bytes) -> ManifestRow | None:
        """Return a user's current version."""
        rows = self.read(sql.HEAD, {"tenant": tenant, "user": user})
        return ManifestRow(*rows[0]) if rows else None

    def versions(self, tenant: str, user: bytes) -> list[ManifestRow]:
        """Return a user's stored versions, newest first."""
        return [ManifestRow(*row) for row in self.read(sql.ALL, {"tenant": tenant, "user": user})]

    def heads(self, tenant: str, after: bytes | None = None) -> Iterator[ManifestRow]:
        """Yield every user's current version, ordered by user, from the beginning or `after` a user."""
        if after is None:
            page = self.read(sql.FIRST_HEADS, {"tenant": tenant})
        else:
            page = self.read(sql.NEXT_HEADS, {"tenant": tenant, "after": after})
        while page:
            yield from (ManifestRow(*row) for row in page)
            page = self.read(sql.NEXT_HEADS, {"tenant": tenant, "after": page[-1][1]})

    def rows(self) -> Iterator[ManifestRow]:
        """Yield every version of every user of every tenant."""
        page = self.read(sql.FIRST_ROWS)
        while page:
            yield from (ManifestRow(*row) for row in page)
            page = self.read(sql.NEXT_ROWS, dict(zip(("tenant", "user", "version"), page[-1], strict=False)))

    def owners_of_records(self) -> list[tuple[str, bytes]]:
        """Return tenant and key of every user who has a record."""
        return self.read(sql.USERS)

    def add(self, row: ManifestRow) -> int:
        """Add a row as its user's new current version, ignoring its version and parent; return the new number."""
        ((version,),) = self.read(sql.ADD, row._asdict())
        return int(version)

    def drop_user(self, tenant: str, user: bytes) -> bool:
        """Remove a user with all versions; none of their bytes may wait any more. Return whether there were any."""
        rows = self.versions(tenant, user)
        self._drop(rows, {"tenant": None, "user": None})
        self.write(sql.DISOWN, {"of_tenant": tenant, "of_user": user})
        return bool(rows)

    def _drop(self, rows: Sequence[ManifestRow], owner: Mapping[str, object]) -> None:
        """Remove versions, and schedule for erasure the bytes that no other version of the user shares."""
        for row in rows:
            own = {"tenant": row.tenant, "user": row.user}
            self.remove(row)
            at = {"at_blob": row.blob, "at_offset": row.offset}
            if row.blob is not None and not self.read(sql.SHARED, {**own, **at}):
                offset = row.offset if row.blob.endswith(".shard") else None
                self.write(sql.ERASE, {"blob": row.blob, "offset": offset, "length": row.length, **owner})

    def remove(self, row: ManifestRow) -> None:
        """Remove a version; its bytes stay (inside a transaction)."""
        self.write(sql.DROP, {"tenant": row.tenant, "user": row.user, "version": row.version})

    def prune(self, tenant: str, user: bytes, keep: int) -> None:
        """Remove all but the `keep` newest versions of a user."""
        self._drop(self.versions(tenant, user)[keep:], {"tenant": tenant, "user": user})

    def erase_later(self, blob: str, offset: int | None, length: int | None) -> None:
        """Schedule bytes for erasure that must not wait; without an offset, a whole file."""
        self.write(sql.ERASE, {"blob": blob, "offset": offset, "length": length, "tenant": None, "user": None})

    def erasures(self) -> list[Erasure]:
        """Return the scheduled erasures, ordered by blob."""
        return [Erasure(*row) for row in self.read(sql.LIST_ERASURES)]

    def replaced(self) -> set[int]:
        """Return the ids of the erasures that may wait: of versions of users who have newer ones."""
        return {number for (number,) in self.read(sql.REPLACED)}

    def erased(self, done: Iterable[Erasure]) -> None:
        """Remove erasures that are done (inside a transaction)."""
        for each in done:
            self.write(sql.ERASED, each._asdict())

    def layout_id(self, spec: str) -> int:
        """Return the number of a layout, adding it if it is new (inside a transaction)."""
        found = self.read(sql.LAYOUT_ID, {"spec": spec}) or self.read(sql.ADD_LAYOUT, {"spec": spec})
        return int(found[0][0])

    def layout(self, number: int) -> str | None:
        """Return the layout of this number."""
        found = self.read(sql.LAYOUT, {"id": number})
        return found[0][0] if found else None

    def shards(self) -> dict[int, int]:
        """Return the committed size of every shard."""
        return dict(self.read(sql.LIST_SHARDS))

    def shard_size(self, number: int) -> int | None:
        """Return the committed size of a shard; None if it has been removed."""
        found = self.read(sql.SHARD_SIZE, {"id": number})
        return found[0][0] if found else None

    def refers_to(self, blob: str) -> bool:
        """Return whether a record refers to bytes of a blob."""
        return bool(self.read(sql.REFERS, {"blob": blob}))

    def referenced(self) -> set[str]:
        """Return the blobs that records refer to."""
        return {row[0] for row in self.read(sql.BLOBS)}

    def live_bytes(self) -> dict[str, int]:
        """Return how many bytes of each blob records refer to."""
        return dict(self.read(sql.LIVE))

    def owners(self, blobs: Sequence[str]) -> dict[ByteRange, tuple[str, bytes]]:
        """Return tenant and user of every referenced range of these blobs, in byte order."""
        rows = (row for blob in sorted(blobs) for row in self.read(sql.OWNERS, {"blob": blob}))
        return {ByteRange(*row[:3]): (row[3], row[4]) for row in rows}

    def move(self, owner: tuple[str, bytes], old: ByteRange, new: ByteRange) -> bool:
        """Point a user's versions from `old` to the copy at `new`; return whether any version referred to `old`."""
        places = {"at_blob": old.blob, "at_offset": old.offset, "to_blob": new.blob, "to_offset": new.offset}
        return self.write(sql.MOVE, {"tenant": owner[0], "user": owner[1], **places}) > 0

    def grow(self, sizes: Iterable[tuple[int, int]]) -> None:
        """Record new committed sizes of shards, given as (size, number) (inside a transaction)."""
        for size, number in sizes:
            self.write(sql.GROW, {"grown": size, "number": number})

    def new_shard(self) -> int:
        """Add an empty shard and return its number."""
        with self.transaction():
            ((number,),) = self.read(sql.ADD_SHARD)
        return int(number)

    def drop_shard(self, number: int) -> None:
        """Remove a shard (inside a transaction)."""
        self.write(sql.DROP_SHARD, {"id": number})
