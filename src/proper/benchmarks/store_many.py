"""Costs of a store with many users of 4 KiB each: bulk put, look-ups, opening, deleting, compaction and disk usage.

Users have an adapter and no embedding, so their payload is exactly 4 KiB.
"""

from __future__ import annotations

import os
import random
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import torch

from proper.adapters.compaction import compact
from proper.adapters.store import AdapterStore, UserRecord
from proper.benchmarks.timing import percentile, seconds_of
from proper.layers.bank import Layout
from proper.run_folder import Tier

PAYLOAD = 4096
_BATCH = 10_000
_LOOKUPS = 20_000
_DELETED = 1_000


def many_figures(folder: Path, users: int) -> dict[str, float]:
    """Return the figures of a store with `users` users; needs about 4.3 KB of disk per user, plus half of that."""
    figures = {"users": float(users)}
    store = AdapterStore(folder)
    seconds = 0.0
    for first in range(0, users, _BATCH):
        seconds += seconds_of(partial(store.put, list(_people(first, min(users, first + _BATCH)))))
    figures |= {"put_seconds": seconds, "puts_per_second": users / seconds}
    store.close()
    figures["bytes_over_raw"] = disk_bytes(folder) / (users * PAYLOAD)
    start = time.perf_counter()
    store = AdapterStore(folder)
    store.get(_name(users // 2))
    figures["open_ms"] = (time.perf_counter() - start) * 1e3
    figures |= _lookups(store, users)
    gone = random.Random(1).sample(range(users), _DELETED)
    figures["delete_1000_ms"] = seconds_of(lambda: store.delete_many(map(_name, gone))) * 1e3
    figures |= _compaction(store, users)
    store.close()
    return figures


def disk_bytes(folder: Path) -> int:
    """Return the disk usage of a folder's files in bytes."""
    return sum(os.stat(path).st_blocks * 512 for path in folder.rglob("*") if path.is_file())


def _lookups(store: AdapterStore, users: int) -> dict[str, float]:
    """Time the look-up of a user's row and the read of a whole record, for users in random order."""
    draw = random.Random(0)
    names = [_name(draw.randrange(users)) for _ in range(_LOOKUPS)]
    heads = [seconds_of(partial(store.head, name)) * 1e3 for name in names]
    records = [seconds_of(partial(store.get, name)) * 1e3 for name in names[: _LOOKUPS // 4]]
    figures: dict[str, float] = {}
    for title, times in (("lookup", heads), ("get", records)):
        figures |= {f"{title}_p{share}_ms": percentile(times, share) for share in (50, 99)}
    return figures


def _compaction(store: AdapterStore, users: int) -> dict[str, float]:
    """Time deletion of every second user of the first half, and the compaction that frees their bytes."""
    store.delete_many(_name(at) for at in range(0, users // 2, 2))
    start = time.perf_counter()
    done = compact(store)
    seconds = time.perf_counter() - start
    given = done.bytes_before - done.bytes_after
    return {"compact_seconds": seconds, "compact_shards": float(done.shards), "compact_bytes_given_back": float(given)}


def _people(first: int, last: int) -> Iterator[UserRecord]:
    # Two modules in four layers at rank 4: 2,048 parameters in bf16.
    layout = Layout.of({f"h.{at}.fc": (60, 68) for at in range(4)}, 4)
    none, generator = torch.zeros(0), torch.Generator().manual_seed(first)
    for at in range(first, last):
        row = torch.randn(layout.width, generator=generator).bfloat16()
        yield UserRecord(_name(at), Tier.USERS, none, layout.unpack(row))


def _name(at: int) -> str:
    return f"user-{at:07d}"
