"""`proper bench store`: load time of one large adapter, and costs of a store with a million small adapters.

The large adapter has the shapes of a 1.5 B model: rank 4 on 7 projections of 32 layers, bf16, 11.6 MB. Its load from
the store into a slot is compared with a memcpy of equal size and with PEFT's `load_adapter`. Loads are warm: the file
is in the page cache, as the source of the memcpy is in memory. Sides alternate, and each cycles through several
adapters and slots, so that no side finds its bytes in the core's cache.

Each small adapter has exactly 4 KiB: those users have no embedding. Measured are bulk put, look-ups, opening, deletion,
compaction and disk usage.
"""

from __future__ import annotations

import ctypes
import logging
import os
import random
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
import xxhash
from torch import Tensor

from proper.adapters.compaction import compact
from proper.adapters.load import RowLoader
from proper.adapters.store import FILE_BYTES, KEEP, SHARD_BYTES, AdapterStore, UserRecord
from proper.benchmarks.measure import TimedSide, interleaved, machine, percentile, seconds_of
from proper.benchmarks.object_storage import SIDES, object_figures
from proper.layers.bank import AdapterBank
from proper.layers.layout import Layout
from proper.run_folder import Tier

logger = logging.getLogger(__name__)

MANY, QUICK = 1_000_000, 100_000


def run(folder: Path | None = None, *, users: int = MANY, repeats: int = 400, url: str | None = None) -> dict[str, Any]:
    """Return {"setting", "figures"} of the benchmark.

    Args:
        folder: a folder on the disk to measure; None selects the system's temporary folder.
        users: users in the store of small adapters; a million needs about 6 GB.
        repeats: repeats of loading the large adapter.
        url: s3://BUCKET/PREFIX; measures loads from object storage only (`benchmarks.object_storage`).
    """
    if url is not None:
        with tempfile.TemporaryDirectory(prefix="proper-bench-", dir=folder) as name:
            figures = object_figures(Path(name), url, shapes(), RANK, repeats)
        return {"setting": {"machine": machine(), "torch": torch.__version__, **SIDES}, "figures": _rounded(figures)}
    with tempfile.TemporaryDirectory(prefix="proper-bench-", dir=folder) as name:
        logger.info("store: loading an adapter of 11.6 MB, beside memcpy and PEFT")
        figures = load_figures(Path(name) / "load", repeats, every=min(20, repeats))
        logger.info(f"store: {users} users of {PAYLOAD} bytes")
        figures |= many_figures(Path(name) / "many", users)
    setting = {
        "machine": machine(),
        "torch": torch.__version__,
        "xxhash": xxhash.XXHASH_VERSION,
        "load": f"rank {RANK} on 7 projections of {LAYERS} layers, bf16, warm, into a bf16 slot, xxh3 checked",
        "load_fp32_slot": "the same, widened into an fp32 slot of twice the bytes",
        "memcpy": "the C library's, of the same bytes; p50 over p50 and p99 over p99 of the same repeats",
        "peft_load": "PEFT's load_adapter of equal bytes, warm, in every 20th repeat; deleting the last one is untimed",
        "many": f"{users} users, an adapter of {PAYLOAD} bytes each, no embedding; disk bytes after closing",
        "compact": "after every second one of the first half of the users is deleted",
        "store": {"keep": KEEP, "file_bytes": FILE_BYTES, "shard_bytes": SHARD_BYTES},
    }
    return {"setting": setting, "figures": _rounded(figures)}


def _rounded(figures: Mapping[str, float]) -> dict[str, float]:
    return {key: value if value.is_integer() else float(f"{value:.4g}") for key, value in figures.items()}


LAYERS, HIDDEN, KEYS, MIDDLE, RANK = 32, 2048, 512, 8616, 4
_ROUND = 8


def shapes() -> dict[str, tuple[int, int]]:
    """Return (inputs, outputs) of every adapted module."""
    sizes = {
        "self_attn.q_proj": (HIDDEN, HIDDEN),
        "self_attn.k_proj": (HIDDEN, KEYS),
        "self_attn.v_proj": (HIDDEN, KEYS),
        "self_attn.o_proj": (HIDDEN, HIDDEN),
        "mlp.gate_proj": (HIDDEN, MIDDLE),
        "mlp.up_proj": (HIDDEN, MIDDLE),
        "mlp.down_proj": (MIDDLE, HIDDEN),
    }
    return {f"model.layers.{at}.{name}": size for at in range(LAYERS) for name, size in sizes.items()}


def load_figures(folder: Path, repeats: int, every: int) -> dict[str, float]:
    """Return the figures of loading one adapter, in ms and as ratios.

    Args:
        folder: an empty folder with about 100 MB of free space.
        repeats: repeats of the store and the memcpy.
        every: PEFT, which is slower, runs once in this many repeats.
    """
    layout = Layout.of(shapes(), RANK)
    row = torch.randn(layout.width, generator=torch.Generator().manual_seed(0)).bfloat16()
    store = AdapterStore(folder / "store")
    for at in range(_ROUND):
        store.put([UserRecord(f"u{at}", Tier.USERS, torch.zeros(0), layout.unpack(row.roll(at)))])
    sides = {name: TimedSide(work) for name, work in _sides(store, layout, row).items()}
    sides["peft_load"] = _peft_side(folder / "peft", every)
    seconds = interleaved(sides, repeats)
    store.close()
    figures = {"load_bytes": float(row.numel() * row.itemsize)}
    for name, times in seconds.items():
        figures |= {f"{name}_p{share}_ms": percentile(times, share) * 1e3 for share in (50, 99)}
    for share in (50, 99):
        for name in ("load", "load_fp32_slot"):
            figures[f"{name}_p{share}_over_memcpy"] = figures[f"{name}_p{share}_ms"] / figures[f"memcpy_p{share}_ms"]
    return figures


def _sides(store: AdapterStore, layout: Layout, row: Tensor) -> dict[str, Callable[[int], object]]:
    same = AdapterBank(layout, _ROUND, alpha=8.0, trainable=False, dtype=torch.bfloat16).values
    wide = AdapterBank(layout, _ROUND, alpha=8.0, trainable=False).values
    sources = [row.roll(at).clone() for at in range(_ROUND)]
    targets = torch.zeros(_ROUND, layout.width, dtype=torch.bfloat16)
    loader, size = RowLoader(store, layout), row.numel() * row.itemsize

    def memcpy(at: int) -> object:
        slot = at % _ROUND
        return ctypes.memmove(targets[slot].data_ptr(), sources[slot].data_ptr(), size)

    sides: dict[str, Callable[[int], object]] = {
        "load": lambda at: loader.load(f"u{at % _ROUND}", same[at % _ROUND]),
        "memcpy": memcpy,
        "load_fp32_slot": lambda at: loader.load(f"u{at % _ROUND}", wide[at % _ROUND]),
    }
    for side in sides.values():
        for at in range(_ROUND):
            side(at)
    for bank in (same, wide, targets):
        if not all(torch.equal(bank[at].bfloat16(), sources[at]) for at in range(_ROUND)):
            raise AssertionError("a side of the benchmark copied something else")
    return sides


def _peft_side(folder: Path, every: int) -> TimedSide:
    """Return PEFT's side: `load_adapter` of equal size from a folder, into a model of these shapes."""
    from peft import LoraConfig, get_peft_model

    # Only the shapes matter: the frozen weights are never read, so their memory is never touched.
    with torch.device("meta"):
        bare = _Shapes(shapes())
    config = LoraConfig(r=RANK, lora_alpha=8, target_modules=[name.rpartition(".")[2] for name in shapes()])
    model: Any = get_peft_model(bare.to_empty(device="cpu").to(torch.bfloat16), config, autocast_adapter_dtype=False)
    model.save_pretrained(folder)

    def unload(at: int) -> None:
        if "loaded" in model.peft_config:
            model.delete_adapter("loaded")

    def load(at: int) -> None:
        model.load_adapter(folder, "loaded", autocast_adapter_dtype=False)

    return TimedSide(load, unload, every)


class _Shapes(torch.nn.Module):
    """A module with only the named linear layers."""

    def __init__(self, sizes: Mapping[str, tuple[int, int]]) -> None:
        super().__init__()
        for name, (inputs, outputs) in sizes.items():
            *parents, last = name.split(".")
            module: torch.nn.Module = self
            for parent in parents:
                if parent not in module._modules:
                    module.add_module(parent, torch.nn.Module())
                module = module.get_submodule(parent)
            module.add_module(last, torch.nn.Linear(inputs, outputs, bias=False))


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
        seconds += seconds_of(partial(store.put, list(_records(first, min(users, first + _BATCH)))))
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


def _records(first: int, last: int) -> Iterator[UserRecord]:
    # Two modules in four layers at rank 4: 2,048 parameters in bf16.
    layout = Layout.of({f"h.{at}.fc": (60, 68) for at in range(4)}, 4)
    none, generator = torch.zeros(0), torch.Generator().manual_seed(first)
    for at in range(first, last):
        row = torch.randn(layout.width, generator=generator).bfloat16()
        yield UserRecord(_name(at), Tier.USERS, none, layout.unpack(row))


def _name(at: int) -> str:
    return f"user-{at:07d}"
