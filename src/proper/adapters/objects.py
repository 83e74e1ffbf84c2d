"""Shard storage in an S3 bucket, with a cache on the local disk in front.

    PREFIX/N.shard    the adapters that one put wrote, or a part of them; written once, never changed

The manifest gives out each number before the object is written. A number whose size was never committed belongs to a
put that was killed: its object is removed, and if that writer lives after all, its commit fails. Two writers never
write one object: the server refuses the second (`Bucket.put_new`), even if an older manifest gives a number out again.

Ranges of an object cannot be zeroed: erasing one rewrites the object without it, then removes the old object with all
its versions. A deletion does so at once with all objects that hold bytes of the user. A version that a newer one
replaces waits until a quarter of its object is dead.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from datetime import UTC, datetime, timedelta
from itertools import groupby
from pathlib import Path

import xxhash

from proper.adapters.bucket import Bucket, MissingObjectError
from proper.adapters.manifest import ByteRange, Manifest, ManifestRow, shard_name, shard_number
from proper.adapters.object_writer import ObjectWriter
from proper.adapters.shard_cache import ShardCache
from proper.adapters.shards import BlobError
from proper.adapters.storage import Aside, ShardWriter, move_live
from proper.files import atomic_path, locked

OBJECT_BYTES = 16 << 20
"""Size at which a put starts another object: the most that erasing one adapter has to read and write again."""

_DEAD = 0.25  # share of an object's bytes that wait for erasure from which on it is rewritten
_SMALL = 0.25  # share of `OBJECT_BYTES` below which objects are joined


class ObjectShards:
    """The objects below a prefix.

    Args:
        bucket: bucket and prefix.
        manifest: the manifest of the objects.
        cache: the cache in front.
        lock: the file that writers of objects hold shared until they have committed.
        claim: called before something is written; raises if the prefix belongs to another run.
    """

    def __init__(
        self, bucket: Bucket, manifest: Manifest, cache: ShardCache, lock: Path, claim: Callable[[], None]
    ) -> None:
        self.bucket, self.manifest, self.cache, self._lock, self._claim = bucket, manifest, cache, lock, claim

    @property
    def name(self) -> str:
        """The URL of the prefix."""
        return self.bucket.url

    def where(self, blob: str) -> str:
        """Return an object's URL."""
        return self.bucket.url + blob

    def make(self) -> None:
        """Do nothing: the prefix is claimed before the first write, so that reading needs no further request."""

    def writer(self, shard_bytes: int) -> ShardWriter:
        """Return a writer; objects are full at `shard_bytes` or OBJECT_BYTES, whichever is less."""
        return ObjectWriter(self.bucket, self.manifest, min(shard_bytes, OBJECT_BYTES), self._claim)

    def fill(self, row: ManifestRow, target: memoryview) -> None:
        """Read a row's adapter into `target`: from the cache, or from its object and into the cache."""
        place = row.place
        assert place is not None
        if self.cache.read(place, target) and xxhash.xxh3_64_digest(target) == row.xxh3:
            return
        try:
            data = self.bucket.read(*place)
        except MissingObjectError as error:
            raise BlobError(str(error)) from error
        if xxhash.xxh3_64_digest(data) != row.xxh3:
            raise BlobError("its checksum differs")
        target[:] = data
        self.cache.add(place, data, lambda: self._is_current(row))

    def _is_current(self, row: ManifestRow) -> bool:
        return any(each.place == row.place for each in self.manifest.versions(row.tenant, row.user))

    def stream(self, row: ManifestRow, buffer: memoryview, take: Callable[[int, int], None]) -> None:
        """Read a row's adapter through `buffer`."""
        whole = memoryview(bytearray(row.length))
        self.fill(row, whole)
        for at in range(0, len(whole), len(buffer)):
            piece = whole[at : at + len(buffer)]
            buffer[: len(piece)] = piece
            take(at, len(piece))

    def pieces(self, place: ByteRange) -> Iterator[bytes]:
        """Yield the bytes of a range of an object; nothing if the object is shorter."""
        try:
            yield self.bucket.read(*place)
        except MissingObjectError as error:
            if self.bucket.size(place.blob) is None:
                raise FileNotFoundError(self.where(place.blob)) from error

    def erase(self, *, thorough: bool = True) -> None:
        """Rewrite the objects with scheduled ranges, and remove objects; see the module."""
        if thorough:
            self._schedule_killed_puts()
            self.sweep()
        noted, sizes = self.manifest.erasures(), self.manifest.shards()
        if not noted:
            return
        gone, chosen, may_wait = list[str](), list[str](), self.manifest.replaced()
        for blob, rows in groupby(noted, key=lambda each: each.blob):
            ranges = list(rows)
            size, dead = sizes.get(shard_number(blob), 0), sum(each.length or 0 for each in ranges)
            if any(each.offset is None for each in ranges):
                gone.append(blob)
            elif dead >= _DEAD * size or (thorough and any(each.id not in may_wait for each in ranges)):
                chosen.append(blob)
        if not gone and not chosen:
            return  # without a request: a store opens while the bucket does not answer
        self._claim()
        if chosen:
            live = self.manifest.referenced()
            gone += [blob for blob in chosen if blob not in live]
            with locked(self._lock, shared=True):
                for group in self._groups([blob for blob in chosen if blob in live], sizes):
                    self._rewrite(group, self.writer(OBJECT_BYTES), skip=False)
                    gone += group
        if gone:
            self._remove(gone)

    def remove_unowned(self, patience: float) -> bool:
        """Do nothing: a thorough `erase` finds the objects of killed puts by their numbers."""
        return True

    def sweep(self) -> None:
        """Wipe what the cache has of objects that the manifest no longer has."""
        self.cache.retain(lambda: {shard_name(number) for number in self.manifest.shards()})

    def _remove(self, blobs: Sequence[str]) -> None:
        """Remove objects with their versions and what the cache has of them; then their erasures are done."""
        gone = set(blobs)
        noted = [each for each in self.manifest.erasures() if each.blob in gone]
        self.cache.remove(ByteRange(each.blob, each.offset or 0, each.length or 0) for each in noted)
        for blob in blobs:
            self.bucket.abort_uploads(blob)
            self.bucket.remove(blob)
        with self.manifest.transaction():
            self.manifest.erased(noted)
            for blob in blobs:
                self.manifest.drop_shard(shard_number(blob))

    def _schedule_killed_puts(self) -> None:
        """Schedule for erasure the objects of numbers that were given out and never committed.

        The lock shows whether processes of this machine write. With PostgreSQL those of others may, so that only
        objects that are a day old count.
        """
        numbers = [number for number, size in self.manifest.shards().items() if size == 0]
        if self.manifest.read_only or not numbers:
            return
        if self.manifest.engine != "sqlite":
            day = datetime.now(UTC) - timedelta(days=1)
            old = {each.key for each in self.bucket.objects() if each.modified < day}
            numbers = [number for number in numbers if shard_name(number) in old]
        with locked(self._lock, patience=0) as alone:
            if alone is None:
                return  # another process writes: its numbers are not committed yet
            with self.manifest.transaction():
                for number in numbers:
                    if self.manifest.shard_size(number) == 0:
                        self.manifest.drop_shard(number)
                        self.manifest.erase_later(shard_name(number), None, None)

    def _groups(self, blobs: Sequence[str], sizes: dict[int, int]) -> Iterator[list[str]]:
        """Yield the blobs in groups of about OBJECT_BYTES, so that small objects are merged."""
        group, total = list[str](), 0
        for blob in blobs:
            group.append(blob)
            total += sizes.get(shard_number(blob), 0)
            if total >= OBJECT_BYTES:
                yield group
                group, total = [], 0
        if group:
            yield group

    def _rewrite(self, blobs: Sequence[str], writer: ShardWriter, *, skip: bool) -> int:
        """Copy the live ranges of objects to new ones, and schedule the objects for erasure; return how many.

        A missing object is left out: `check` reports it, with the users whose adapters are lost. So is one that is cut
        off, if `skip`; without, it is an error.
        """
        whole = dict[str, bytes]()
        for blob in blobs:
            try:
                whole[blob] = self.bucket.read(blob, 0, self.manifest.shard_size(shard_number(blob)) or 0)
            except MissingObjectError:
                if not skip and self.bucket.size(blob) is not None:
                    raise
        try:
            copies = move_live(
                self.manifest, writer, list(whole), lambda at: whole[at.blob][at.offset : at.offset + at.length]
            )
        except BaseException:
            writer.undo()
            raise
        writer.done()
        self.cache.move(copies)
        return len(whole)

    def compact(self, below: float, writer: ShardWriter) -> int:
        """Rewrite objects with few live bytes, and merge small ones if there are several."""
        self._claim()
        sizes, alive = self.manifest.shards(), self.manifest.live_bytes()
        small = [number for number, size in sizes.items() if 0 < size < _SMALL * OBJECT_BYTES]
        chosen = {number for number, size in sizes.items() if size and alive.get(shard_name(number), 0) < below * size}
        chosen |= set(small) if len(small) > 1 else set()
        groups = self._groups([shard_name(number) for number in sorted(chosen)], sizes)
        return sum(self._rewrite(group, writer, skip=True) for group in groups)

    def blobs(self) -> Iterator[tuple[str, int]]:
        """Yield name and size of every object."""
        for each in self.bucket.objects():
            yield each.key, each.size

    def set_aside(self, blob: str, target: Path) -> None:
        """Move an object to a local file."""
        size = self.bucket.size(blob) or 0
        with atomic_path(target) as temporary, temporary.open("wb") as file:
            for at in range(0, size, OBJECT_BYTES):
                file.write(self.bucket.read(blob, at, min(OBJECT_BYTES, size - at)))
        self.bucket.remove(blob)

    def orphan_bytes(self, number: int, size: int, keep: Aside | None) -> int:
        """Count the bytes of an object that neither records nor scheduled erasures refer to."""
        blob, at, found = shard_name(number), 0, 0
        waiting = [(each.offset or 0, each.length or size) for each in self.manifest.erasures() if each.blob == blob]
        known = [*((place.offset, place.length) for place in self.manifest.owners([blob])), *waiting, (size, 0)]
        for start, length in sorted(known):
            if start > at:
                found += start - at
                if keep is not None:
                    keep(f"{blob}.{at}-{start}", self.pieces(ByteRange(blob, at, start - at)))
                    with self.manifest.transaction():
                        self.manifest.erase_later(blob, at, start - at)
            at = max(at, start + length)
        if found and keep is not None:
            self.erase()
        return found
