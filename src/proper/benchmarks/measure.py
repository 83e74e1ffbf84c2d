"""Measurement that all benchmarks share: interleaved timing, percentiles and a description of the hardware.

Alternatives take turns, so that other load on the machine affects all of them equally.
"""

from __future__ import annotations

import os
import platform
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch


def _nothing(at: int) -> None:
    """Do nothing; the default preparation of a side."""


def _silent(line: str) -> None:
    """Print nothing; output would disturb timings of microseconds."""


@dataclass(frozen=True)
class TimedSide:
    """One implementation to be timed.

    Attributes:
        work: the timed function; its argument is the number of the repeat.
        prepare: function that runs before `work` and is not timed.
        every: the side runs once in this many repeats.
    """

    work: Callable[[int], object]
    prepare: Callable[[int], object] = _nothing
    every: int = 1


def interleaved(
    sides: Mapping[str, TimedSide], repeats: int, log: Callable[[str], object] = _silent
) -> dict[str, list[float]]:
    """Return seconds per call of each side.

    Every repeat runs each side once. The first repeat, and each repeat after a run of a side with `every` above 1, is
    not counted, because the CPU caches are cold for the other sides.

    Args:
        sides: implementations by name.
        repeats: number of counted runs of each side.
        log: callback that receives every repeat's seconds.
    """
    seconds: dict[str, list[float]] = {name: [] for name in sides}
    at, counted, cold = 0, 0, True
    while counted < repeats:
        rare, taken = False, []
        for name, side in sides.items():
            if (side.every == 1) if cold else (counted % side.every == side.every - 1):
                side.prepare(at)
                duration = seconds_of(partial(side.work, at))
                seconds[name] += [] if cold else [duration]
                taken.append(f"{name} {duration:.3g} s")
                rare = rare or side.every > 1
        counted += not cold
        log(f"{'warm-up' if cold else f'repeat {counted} of {repeats}'}: {', '.join(taken)}")
        at, cold = at + 1, rare
    return seconds


def seconds_of(work: Callable[[], object]) -> float:
    """Return the duration of one call in seconds."""
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def percentile(values: list[float], share: float) -> float:
    """Return the percentile `share` (0 to 100) of the values."""
    return float(np.percentile(values, share))


_FEATURES = ("avx2", "avx512f", "avx512_bf16", "amx_bf16")
"""CPU features that most affect the speed of matrix products in bf16 and fp32."""


def machine(device: torch.device | None = None) -> str:
    """Return architecture, cores, threads and CPU features; for a GPU its name too."""
    path = Path("/proc/cpuinfo")
    flags = set(path.read_text(encoding="utf-8").split()) if path.exists() else set()
    parts = [platform.machine(), f"{os.cpu_count()} cores", f"{torch.get_num_threads()} threads"]
    if device is not None and device.type == "cuda":
        parts.append(torch.cuda.get_device_name(device))
    return ", ".join(parts + [flag for flag in _FEATURES if flag in flags])
