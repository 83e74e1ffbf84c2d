"""Shard compaction: frees the space that deleted users and replaced versions leave in shards.

The live bytes of a shard with too few of them are appended to another shard, one transaction points the manifest rows
there, and the old file is removed. A concurrent reader that finds the file gone looks the row up again; the copy of a
user deleted meanwhile is wiped. Shards that another process appends to are skipped.
"""

from __future__ import annotations

import os
from dataclasses import dataclass

from proper.adapters.manifest import ByteRange, shard_name
from proper.adapters.shards import erase, lock_shard
from proper.adapters.store import AdapterStore
from proper.errors import StoreError

ALIVE = 0.8
_TOGETHER = 8


@dataclass(frozen=True)
class Compaction:
    """The result of a compaction.

    Attributes:
        shards: number of shards rewritten.
        bytes_before, bytes_after: total size of all shards.
    """

    shards: int
    bytes_before: int
    bytes_after: int


def compact(store: AdapterStore, below: float = ALIVE) -> Compaction:
    """Rewrite the shards whose share of live bytes is less than `below`.

    Raises:
        StoreError: the disk is full; no adapter has moved.
    """
    manifest, shards = store.manifest, 0
    with store.appending():
        store.writer.close()  # so that its shard can be rewritten too
        before = manifest.shards()
        alive = manifest.live_bytes()
        poor = [number for number, size in before.items() if size and alive.get(shard_name(number), 0) < below * size]
        for at in range(0, len(poor), _TOGETHER):
            shards += _rewrite(store, poor[at : at + _TOGETHER])
    erase(store.blobs, manifest)
    return Compaction(shards, sum(before.values()), sum(manifest.shards().values()))


def _rewrite(store: AdapterStore, numbers: list[int]) -> int:
    files: dict[str, int] = {}
    try:
        for number in numbers:
            file = lock_shard(store.blobs, number)
            if file is not None:
                files[shard_name(number)] = file
                # Skip a truncated shard: `check` reports it, with the users whose adapters are damaged.
                if os.fstat(file).st_size < (store.manifest.shard_size(number) or 0):
                    os.close(files.pop(shard_name(number)))
        try:
            _move(store, files)
        except BaseException as error:
            store.writer.undo()
            if isinstance(error, OSError):
                raise StoreError(f"{store.blobs}: cannot be compacted: {error.strerror or error}") from error
            raise
        store.writer.done()
    finally:
        for file in files.values():
            os.close(file)
    return len(files)


def _move(store: AdapterStore, files: dict[str, int]) -> None:
    manifest, writer = store.manifest, store.writer
    owners = manifest.owners(list(files))
    copies: dict[ByteRange, ByteRange] = {}
    for place in owners:
        data = os.pread(files[place.blob], place.length, place.offset)
        copies[place] = writer.append(data.ljust(place.length, b"\0"))
    writer.sync()
    with manifest.transaction():
        for old, new in copies.items():
            if not manifest.move(owners[old], old, new):
                manifest.erase_later(*new)
        manifest.grow(writer.sizes())
        for name in files:
            manifest.drop_shard(int(name.partition(".")[0]))
            manifest.erase_later(name, None, None)
