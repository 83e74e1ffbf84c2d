"""Load time of one 11.6 MB adapter from the store into its slot, against a memcpy of equal size and `load_adapter`.

The adapter has the shapes of a 1.5 B model: rank 4 on 7 projections of 32 layers, bf16. Loads are warm: the file is in
the page cache, as the source of the memcpy is in memory. Sides alternate, and each cycles through several adapters and
slots, so that no side finds its bytes in the core's cache. `load_adapter` is PEFT's.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from proper.adapters.load import RowLoader
from proper.adapters.store import AdapterStore, UserRecord
from proper.benchmarks.timing import TimedSide, interleaved, percentile
from proper.layers.bank import AdapterBank, Layout
from proper.run_folder import Tier

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
