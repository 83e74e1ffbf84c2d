"""Several ways to do the same, timed in turns, so that whatever else the machine does falls on all of them.

Knows nothing about what is timed.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping

import numpy as np


def interleaved(sides: Mapping[str, Callable[[int], object]], repeats: int, warm: int = 1) -> dict[str, list[float]]:
    """Return seconds per call of each side; every repeat calls each side once, told the repeat's number."""
    seconds: dict[str, list[float]] = {name: [] for name in sides}
    for at in range(-warm, repeats):
        for name, side in sides.items():
            start = time.perf_counter()
            side(at)
            if at >= 0:
                seconds[name].append(time.perf_counter() - start)
    return seconds


def seconds_of(work: Callable[[], object]) -> float:
    """Return how long one call takes."""
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def percentile(values: list[float], share: float) -> float:
    """Return the value below which `share` percent of the values lie."""
    return float(np.percentile(values, share))
