"""Shard compaction: frees the space that deleted users and replaced versions leave in shards.

The live bytes of a shard with too few of them are appended to another shard, one transaction points the manifest rows
there, and the old file or object is removed. A concurrent reader that finds it gone looks the row up again; the copy of
a user deleted meanwhile is wiped. In a folder, shards that another process appends to are skipped; in a bucket, small
objects are merged.
"""

from __future__ import annotations

from dataclasses import dataclass

from proper.adapters.store import AdapterStore

MIN_LIVE_SHARE = 0.8
"""Share of a shard's bytes that records refer to below which it is rewritten."""


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


def compact(store: AdapterStore, below: float = MIN_LIVE_SHARE) -> Compaction:
    """Rewrite the shards whose share of live bytes is less than `below`.

    Raises:
        StoreError: the disk is full, or the bucket cannot be written; no adapter has moved.
    """
    with store.appending():
        before = sum(store.manifest.shards().values())
        shards = store.shards.compact(below, store.writer)
    store.shards.erase()
    return Compaction(shards, before, sum(store.manifest.shards().values()))
