"""Shard storage: the bytes of a store's adapters, in a folder or in a bucket; the manifest has the byte ranges.

A blob is a shard with many adapters, or holds one large adapter. A put writes bytes first and commits the manifest's
rows after them. An adapter exists only if it has a row: bytes that a kill leaves in between have no owner.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Protocol

from proper.adapters.manifest import ByteRange, Manifest, ManifestRow, shard_number
from proper.errors import StoreError

Aside = Callable[[str, Iterable[bytes]], None]
"""Keeps bytes in quarantine under a name."""


class ShardWriter(Protocol):
    """Writes blobs. After writing: `sync`, a commit that records `sizes`, then `done`; or `undo`."""

    def append(self, payload: bytes, /) -> ByteRange:
        """Add bytes to a shard."""
        ...

    def write_file(self, header: bytes, payload: bytes, /) -> ByteRange:
        """Write a large adapter, with its safetensors header, to a blob of its own."""
        ...

    def sync(self) -> None:
        """Make everything written durable."""
        ...

    def sizes(self) -> list[tuple[int, int]]:
        """Return the new size and the number of each shard that grew."""
        ...

    def done(self) -> None:
        """Mark everything written as committed."""
        ...

    def undo(self) -> None:
        """Remove everything written since the last commit, as the manifest records it, whatever the error was."""
        ...

    def close(self) -> None:
        """Release all shards."""
        ...


class ShardStorage(Protocol):
    """Reads, erases, compacts and examines blobs. Errors are `StoreError`, and `shards.BlobError` for bad bytes."""

    @property
    def name(self) -> str:
        """The folder or the URL, for messages."""
        ...

    def where(self, blob: str, /) -> str:
        """Return the path or URL of a blob, for messages."""
        ...

    def make(self) -> None:
        """Make the place for blobs, or claim it, before something is written."""
        ...

    def writer(self, shard_bytes: int, /) -> ShardWriter:
        """Return a writer; a shard of at least `shard_bytes` is full."""
        ...

    def fill(self, row: ManifestRow, target: memoryview, /) -> None:
        """Read the adapter of a row into `target`, which has its length, and compare its checksum."""
        ...

    def stream(self, row: ManifestRow, buffer: memoryview, take: Callable[[int, int], None], /) -> None:
        """Read the adapter of a row through `buffer`; calls `take(at, n)` for each piece: n bytes from offset `at`."""
        ...

    def pieces(self, place: ByteRange, /) -> Iterator[bytes]:
        """Yield the stored bytes of a range, unchecked and past any cache, until its end or that of the blob.

        Raises:
            FileNotFoundError: the blob is missing.
        """
        ...

    def erase(self, *, thorough: bool = True) -> None:
        """Erase scheduled bytes that must not wait; without `thorough`, only if it is cheap or frees enough bytes."""
        ...

    def remove_unowned(self, patience: float, /) -> bool:
        """Remove what killed puts left: bytes without a row, whose owner is unknown, so that a deletion has to.

        Returns False if other writers keep it from that for longer than `patience` (seconds).
        """
        ...

    def sweep(self) -> None:
        """Wipe what this machine keeps of blobs that another machine has erased."""
        ...

    def compact(self, below: float, writer: ShardWriter, /) -> int:
        """Rewrite shards whose share of live bytes is less than `below`, and merge small ones; return how many."""
        ...

    def blobs(self) -> Iterator[tuple[str, int]]:
        """Yield name and size of every blob."""
        ...

    def set_aside(self, blob: str, target: Path, /) -> None:
        """Move a blob to a local file."""
        ...

    def orphan_bytes(self, number: int, size: int, keep: Aside | None, /) -> int:
        """Return how many bytes of a shard of `size` have no owner; with `keep`, quarantine and erase them."""
        ...


def require_grown(manifest: Manifest, sizes: Iterable[tuple[int, int]]) -> None:
    """Require that the manifest has recorded these (size, number) of shards (inside the transaction that did).

    Raises:
        StoreError: another process has removed a shard as one that a killed process left.
    """
    for size, number in sizes:
        if manifest.shard_size(number) != size:
            raise StoreError(f"{manifest.path}: shard {number} was removed while it was written; try again")


def move_live(
    manifest: Manifest, writer: ShardWriter, blobs: Sequence[str], read: Callable[[ByteRange], bytes]
) -> dict[ByteRange, ByteRange]:
    """Copy the live bytes of shards to other shards, point the rows there, and schedule the old shards for erasure.

    A copy whose user was deleted meanwhile is scheduled as well. Returns the copy of each range. The caller calls
    `writer.done` or `writer.undo`.
    """
    owners = manifest.owners(blobs)
    copies = {place: writer.append(read(place)) for place in owners}
    writer.sync()
    with manifest.transaction():
        for old, new in copies.items():
            if not manifest.move(owners[old], old, new):
                manifest.erase_later(*new)
        manifest.grow(writer.sizes())
        require_grown(manifest, writer.sizes())
        for blob in blobs:
            manifest.drop_shard(shard_number(blob))
            manifest.erase_later(blob, None, None)
    return copies
