"""Writer of objects with adapters: a put's adapters are collected in memory, and each object is written once."""

from __future__ import annotations

from collections.abc import Callable

from proper.adapters.bucket import Bucket
from proper.adapters.manifest import ByteRange, Manifest, shard_name
from proper.errors import StoreError


class ObjectWriter:
    """Collects adapters in memory and writes each object once: when it is full, and at `sync`.

    Args:
        bucket: where the objects go.
        manifest: the manifest that gives out numbers.
        object_bytes: an object of at least this size is full.
        claim: as of `objects.ObjectShards`.
    """

    def __init__(self, bucket: Bucket, manifest: Manifest, object_bytes: int, claim: Callable[[], None]) -> None:
        self.bucket, self.manifest, self.object_bytes, self._claim = bucket, manifest, object_bytes, claim
        self._number: int | None = None
        self._collected = bytearray()
        self._given: list[int] = []
        self._written: list[tuple[int, int]] = []

    def append(self, payload: bytes) -> ByteRange:
        """Add bytes to the current object."""
        if self._collected and len(self._collected) + len(payload) > self.object_bytes:
            self.sync()
        if self._number is None:
            self._number = self._new()
        place = ByteRange(shard_name(self._number), len(self._collected), len(payload))
        self._collected += payload
        return place

    def write_file(self, header: bytes, payload: bytes) -> ByteRange:
        """Write an object with one large adapter, without the header."""
        number = self._new()
        self._put(number, payload)
        return ByteRange(shard_name(number), 0, len(payload))

    def sync(self) -> None:
        """Write the current object."""
        if self._number is not None:
            self._put(self._number, bytes(self._collected))
            self._number, self._collected = None, bytearray()

    def sizes(self) -> list[tuple[int, int]]:
        """Return size and number of each object that was written."""
        return list(self._written)

    def done(self) -> None:
        """Mark everything written as committed."""
        self._number, self._collected, self._given, self._written = None, bytearray(), [], []

    def undo(self) -> None:
        """Remove the objects that are not committed."""
        given = self._given
        self.done()  # first: after a manifest that cannot be read, the next commit must not make these objects its own
        given = [number for number in given if not self.manifest.shard_size(number)]
        with self.manifest.transaction():
            for number in given:
                self.manifest.drop_shard(number)
        for number in given:
            self.bucket.remove(shard_name(number))

    def close(self) -> None:
        """Do nothing: a writer holds nothing between two puts."""

    def _new(self) -> int:
        self._claim()
        number = self.manifest.new_shard()
        self._given.append(number)
        return number

    def _put(self, number: int, data: bytes) -> None:
        if not self.bucket.put_new(shard_name(number), data):
            self._given.remove(number)  # another writer's object
            raise StoreError(
                f"{self.bucket.url}{shard_name(number)}: exists already, so the manifest is older than the bucket; "
                "run: proper users check DIR --repair"
            )
        self._written.append((len(data), number))
