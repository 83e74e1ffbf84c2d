"""`proper bench store`: load time of one large adapter, and costs of a store with a million small adapters."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import xxhash

from proper.adapters.store import FILE_BYTES, KEEP, SHARD_BYTES
from proper.benchmarks.machine import machine
from proper.benchmarks.store_load import LAYERS, RANK, load_figures
from proper.benchmarks.store_many import PAYLOAD, many_figures

MANY, QUICK = 1_000_000, 100_000


def run(
    folder: Path | None = None, *, users: int = MANY, repeats: int = 400, say: Callable[[str], None]
) -> dict[str, Any]:
    """Return {"setting", "figures"} of the benchmark.

    Args:
        folder: a folder on the disk to measure; None selects the system's temporary folder.
        users: users in the store of small adapters; a million needs about 6 GB.
        repeats: repeats of loading the large adapter.
        say: callback for progress messages.
    """
    with tempfile.TemporaryDirectory(prefix="proper-bench-", dir=folder) as name:
        say("store: loading an adapter of 11.6 MB, beside memcpy and PEFT")
        figures = load_figures(Path(name) / "load", repeats, every=min(20, repeats))
        say(f"store: {users} users of {PAYLOAD} bytes")
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
    rounded = {key: value if value.is_integer() else float(f"{value:.4g}") for key, value in figures.items()}
    return {"setting": setting, "figures": rounded}
