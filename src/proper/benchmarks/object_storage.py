"""`proper bench store --store s3://BUCKET/PREFIX`: loads of one adapter from object storage, its cache, and a folder.

Three sides alternate in one run: from a store in a folder, from a store in the bucket whose cache holds the adapter
(warm), and from the bucket with an empty cache (cold). The adapter is the large one of `benchmarks.store`, loaded into
a bf16 slot with its checksum compared. Folder and cache are in the page cache. What is written to the bucket is removed
at the end.
"""

from __future__ import annotations

import secrets
from collections.abc import Iterator, Mapping
from contextlib import closing, contextmanager
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from proper.adapters.bucket import Bucket
from proper.adapters.load import RowLoader
from proper.adapters.shard_cache import ShardCache
from proper.adapters.storage_setting import parse_url, record
from proper.adapters.store import AdapterStore, UserRecord
from proper.benchmarks.measure import TimedSide, interleaved, percentile, seconds_of
from proper.layers.bank import AdapterBank
from proper.layers.layout import Layout
from proper.run_folder import RunFolder, Tier

SIDES = {
    "folder": "from a store in a folder, in the page cache",
    "cached": "from a store in the bucket, the adapter in its local cache and in the page cache",
    "object": "from a store in the bucket with an empty cache",
}
"""Source that each side of the figures loads from."""

_USERS = 8


def object_figures(
    folder: Path, url: str, shapes: Mapping[str, tuple[int, int]], rank: int, repeats: int
) -> dict[str, float]:
    """Return times in ms and ratios of loading one adapter, and of putting it.

    Args:
        folder: an empty folder with about 200 MB of free space.
        url: s3://BUCKET/PREFIX; a new prefix below it is used.
        shapes: (inputs, outputs) of every adapted module.
        rank: rank of the adapter.
        repeats: repeats of each side.

    Raises:
        InputError: the text is not such a URL.
        BucketError: the bucket cannot be used.
    """
    layout = Layout.of(shapes, rank)
    rows = [torch.randn(layout.width, generator=torch.Generator().manual_seed(at)).bfloat16() for at in range(_USERS)]
    records = [UserRecord(f"u{at}", Tier.USERS, torch.zeros(0), layout.unpack(row)) for at, row in enumerate(rows)]
    with _temporary(url) as own:
        record(folder / "bucket", own)
        places = {name: RunFolder(folder / name).users.path for name in ("folder", "bucket")}
        with closing(AdapterStore(places["folder"])) as local, closing(AdapterStore(places["bucket"])) as remote:
            puts = {"folder": [seconds_of(partial(local.put, [each])) for each in records]}
            puts["object"] = [seconds_of(partial(remote.put, [each])) for each in records]
            loads = interleaved(_sides(local, remote, layout, rows), repeats)
    figures: dict[str, float] = {}
    for kind, sides in (("load", loads), ("put", puts)):
        for name, times in sides.items():
            figures |= {f"{kind}_{name}_p{share}_ms": percentile(times, share) * 1e3 for share in (50, 99)}
    for share in (50, 99):
        for name in ("cached", "object"):
            key = f"load_{name}_p{share}"
            figures[f"{key}_over_folder"] = figures[f"{key}_ms"] / figures[f"load_folder_p{share}_ms"]
    return figures


def _sides(local: AdapterStore, remote: AdapterStore, layout: Layout, rows: list[Tensor]) -> dict[str, TimedSide]:
    slots = AdapterBank(layout, _USERS, alpha=8.0, trainable=False, dtype=torch.bfloat16).values
    here, there = RowLoader(local, layout), RowLoader(remote, layout)
    cache = ShardCache(remote.paths.cache, 1 << 40)

    def load(loader: RowLoader, at: int) -> None:
        loader.load(f"u{at % _USERS}", slots[at % _USERS])

    def fill_cache(at: int) -> None:
        load(there, at)
        slots[at % _USERS].zero_()

    def empty_cache(at: int) -> None:
        if not torch.equal(slots[at % _USERS], rows[at % _USERS]):
            raise AssertionError("a side of the benchmark loaded something else")
        cache.retain(list)

    return {
        "folder": TimedSide(lambda at: load(here, at)),
        "cached": TimedSide(lambda at: load(there, at), fill_cache),
        "object": TimedSide(lambda at: load(there, at), empty_cache),
    }


@contextmanager
def _temporary(url: str) -> Iterator[str]:
    """Yield a new prefix below a URL; everything below it is removed afterwards."""
    setting = parse_url(url, "")
    prefix = f"{setting.bucket.prefix}proper-bench-{secrets.token_hex(8)}"
    bucket = Bucket(setting.bucket.name, f"{prefix}/")
    try:
        yield f"s3://{bucket.name}/{prefix}"
    finally:
        for key in sorted({each.key for each in bucket.versions()}):
            bucket.remove(key)
