"""The manifest of the adapter store: one SQLite file with every user's record versions and the byte ranges of adapters.

The current version of a user is the one with the highest number. Long reads are paginated, so that no reader keeps an
old snapshot open and a deleted row leaves the write-ahead log at the next checkpoint.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from proper.sqlite_files import Schema, SharedFile

FORMAT = 2
_PAGE = 1000
_TABLES = (
    "CREATE TABLE facts (key TEXT PRIMARY KEY, value TEXT NOT NULL) WITHOUT ROWID",
    # The tensor spec of an adapter's bytes, stored once for all users who share it.
    "CREATE TABLE layouts (id INTEGER PRIMARY KEY, spec TEXT NOT NULL UNIQUE)",
    # Committed size of each shard in bytes; shard numbers are never reused.
    "CREATE TABLE shards (id INTEGER PRIMARY KEY AUTOINCREMENT, size INTEGER NOT NULL)",
    # Bytes that no record refers to any more and that are still to be wiped; offset is NULL for a whole file.
    "CREATE TABLE erasures (id INTEGER PRIMARY KEY, blob TEXT NOT NULL, offset INTEGER, length INTEGER)",
    """CREATE TABLE records (
        tenant TEXT NOT NULL, user BLOB NOT NULL, version INTEGER NOT NULL, parent INTEGER, tier TEXT NOT NULL,
        written INTEGER NOT NULL, facts TEXT NOT NULL, layout INTEGER, blob TEXT, offset INTEGER,
        length INTEGER NOT NULL, xxh3 BLOB, sha256 BLOB, embedding BLOB NOT NULL,
        PRIMARY KEY (tenant, user, version)) WITHOUT ROWID""",
)
# FULL: a version's bytes are wiped after the commit that replaces it, so that commit has to be on the disk.
_SCHEMA = Schema("store", FORMAT, _TABLES, durable=True)


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


_COLUMNS = ", ".join(ManifestRow._fields)
# With MAX(), SQLite takes the other columns from the row that has the maximum.
_HEAD_COLUMNS = ", ".join("MAX(version)" if name == "version" else name for name in ManifestRow._fields)


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


class Manifest(SharedFile):
    """The SQLite file at `path`, created if it does not exist.

    Args:
        path: the file.
        wait_seconds: how long to wait for another process that writes.
        may_make: called before a new file is created; raises if the file must have been lost.

    Raises:
        StoreError: the file is damaged or lost.
    """

    def __init__(self, path: Path, wait_seconds: float, may_make: Callable[[], None] = lambda: None) -> None:
        super().__init__(path, _SCHEMA, wait_seconds, may_make, reads_wait=False)

    def changes(self) -> int:
        """Return a number that changes whenever another connection has committed (PRAGMA data_version)."""
        return int(self.read("PRAGMA data_version")[0][0])

    def facts(self) -> dict[str, str]:
        """Return the metadata that the store is bound to (see `AdapterStore.bind`)."""
        return dict(self.read("SELECT key, value FROM facts"))

    def bind(self, facts: Mapping[str, str]) -> None:
        """Write the metadata that the store is bound to (inside a transaction)."""
        self._db.executemany("INSERT OR REPLACE INTO facts VALUES (?, ?)", facts.items())

    def head(self, tenant: str, user: bytes) -> ManifestRow | None:
        """Return a user's current version."""
        rows = self.read(
            f"SELECT {_COLUMNS} FROM records WHERE tenant = ? AND user = ? ORDER BY version DESC LIMIT 1",
            (tenant, user),
        )
        return ManifestRow(*rows[0]) if rows else None

    def versions(self, tenant: str, user: bytes) -> list[ManifestRow]:
        """Return a user's stored versions, newest first."""
        query = f"SELECT {_COLUMNS} FROM records WHERE tenant = ? AND user = ? ORDER BY version DESC"
        return [ManifestRow(*row) for row in self.read(query, (tenant, user))]

    def heads(self, tenant: str, after: bytes | None = None) -> Iterator[ManifestRow]:
        """Yield every user's current version, ordered by user, from the beginning or `after` a user."""
        select = f"SELECT {_HEAD_COLUMNS} FROM records WHERE tenant = ?"
        order = f"GROUP BY user ORDER BY user LIMIT {_PAGE}"
        following = f"{select} AND user > ? {order}"
        page = self.read(f"{select} {order}", (tenant,)) if after is None else self.read(following, (tenant, after))
        while page:
            yield from (ManifestRow(*row) for row in page)
            page = self.read(following, (tenant, page[-1][1]))

    def rows(self) -> Iterator[ManifestRow]:
        """Yield every version of every user of every tenant."""
        order = f"ORDER BY tenant, user, version LIMIT {_PAGE}"
        page = self.read(f"SELECT {_COLUMNS} FROM records {order}")
        while page:
            yield from (ManifestRow(*row) for row in page)
            following = f"SELECT {_COLUMNS} FROM records WHERE (tenant, user, version) > (?, ?, ?) {order}"
            page = self.read(following, page[-1][:3])

    def add(self, row: ManifestRow) -> int:
        """Add a row as its user's new current version, ignoring its version and parent; return the new number."""
        (newest,) = self._db.execute(
            "SELECT MAX(version) FROM records WHERE tenant = ? AND user = ?", (row.tenant, row.user)
        ).fetchone()
        row = row._replace(version=(newest or 0) + 1, parent=newest)
        self._db.execute(f"INSERT INTO records ({_COLUMNS}) VALUES ({', '.join('?' * len(row))})", row)
        return row.version

    def remove(self, row: ManifestRow) -> None:
        """Remove a version; its bytes stay (inside a transaction)."""
        query = "DELETE FROM records WHERE tenant = ? AND user = ? AND version = ?"
        self.write(query, (row.tenant, row.user, row.version))

    def drop(self, rows: Sequence[ManifestRow]) -> None:
        """Remove versions, and schedule for erasure the bytes that no other version of the user shares."""
        for row in rows:
            key = (row.tenant, row.user)
            self.remove(row)
            shared = "SELECT 1 FROM records WHERE tenant = ? AND user = ? AND blob = ? AND offset = ?"
            if row.blob is not None and not self.read(shared, (*key, row.blob, row.offset)):
                self.erase_later(row.blob, row.offset if row.blob.endswith(".shard") else None, row.length)

    def prune(self, tenant: str, user: bytes, keep: int) -> None:
        """Remove all but the `keep` newest versions of a user."""
        self.drop(self.versions(tenant, user)[keep:])

    def erase_later(self, blob: str, offset: int | None, length: int | None) -> None:
        """Schedule bytes for erasure; without an offset, a whole file."""
        self.write("INSERT INTO erasures (blob, offset, length) VALUES (?, ?, ?)", (blob, offset, length))

    def erasures(self) -> list[Erasure]:
        """Return the scheduled erasures, ordered by blob."""
        return [Erasure(*row) for row in self.read("SELECT id, blob, offset, length FROM erasures ORDER BY blob")]

    def erased(self, done: Iterable[Erasure]) -> None:
        """Remove erasures that are done (inside a transaction)."""
        for each in done:
            # Match the whole row: another process may have removed it, and SQLite may have reused its id.
            self.write("DELETE FROM erasures WHERE id = ? AND blob = ? AND offset IS ? AND length IS ?", each)

    def layout_id(self, spec: str) -> int:
        """Return the number of a layout, adding it if it is new (inside a transaction)."""
        self.write("INSERT OR IGNORE INTO layouts (spec) VALUES (?)", (spec,))
        return int(self.read("SELECT id FROM layouts WHERE spec = ?", (spec,))[0][0])

    def layout(self, number: int) -> str | None:
        """Return the layout of this number."""
        found = self.read("SELECT spec FROM layouts WHERE id = ?", (number,))
        return found[0][0] if found else None

    def shards(self) -> dict[int, int]:
        """Return the committed size of every shard."""
        return dict(self.read("SELECT id, size FROM shards ORDER BY id"))

    def shard_size(self, number: int) -> int | None:
        """Return the committed size of a shard; None if it has been removed."""
        found = self.read("SELECT size FROM shards WHERE id = ?", (number,))
        return found[0][0] if found else None

    def refers_to(self, blob: str) -> bool:
        """Return whether a record refers to bytes of a blob."""
        return bool(self.read("SELECT 1 FROM records WHERE blob = ? LIMIT 1", (blob,)))

    def referenced(self) -> set[str]:
        """Return the blobs that records refer to."""
        return {row[0] for row in self.read("SELECT DISTINCT blob FROM records WHERE blob IS NOT NULL")}

    def live_bytes(self) -> dict[str, int]:
        """Return how many bytes of each blob records refer to."""
        places = "SELECT DISTINCT blob, offset, length FROM records WHERE blob IS NOT NULL"
        return dict(self.read(f"SELECT blob, SUM(length) FROM ({places}) GROUP BY blob"))

    def owners(self, blobs: Sequence[str]) -> dict[ByteRange, tuple[str, bytes]]:
        """Return tenant and user of every referenced range of these blobs, in byte order."""
        marks = ", ".join("?" * len(blobs))
        query = f"SELECT blob, offset, length, tenant, user FROM records WHERE blob IN ({marks}) ORDER BY blob, offset"
        return {ByteRange(*row[:3]): (row[3], row[4]) for row in self.read(query, list(blobs))}

    def move(self, owner: tuple[str, bytes], old: ByteRange, new: ByteRange) -> bool:
        """Point a user's versions from `old` to the copy at `new`; return whether any version referred to `old`."""
        query = "UPDATE records SET blob = ?, offset = ? WHERE tenant = ? AND user = ? AND blob = ? AND offset = ?"
        return self.write(query, (new.blob, new.offset, *owner, old.blob, old.offset)) > 0

    def grow(self, sizes: Iterable[tuple[int, int]]) -> None:
        """Record new committed sizes of shards, given as (size, number) (inside a transaction)."""
        self._db.executemany("UPDATE shards SET size = ? WHERE id = ?", sizes)

    def new_shard(self) -> int:
        """Add an empty shard and return its number."""
        with self.transaction():
            number = self._db.execute("INSERT INTO shards (size) VALUES (0)").lastrowid
        assert number is not None
        return number

    def drop_shard(self, number: int) -> None:
        """Remove a shard (inside a transaction)."""
        self.write("DELETE FROM shards WHERE id = ?", (number,))

    def damage(self) -> list[str]:
        """Return what SQLite finds damaged in the file, one line each."""
        return [row[0] for row in self.read("PRAGMA quick_check") if row[0] != "ok"]
