"""Several ways to do the same, timed in turns, so that whatever else the machine does falls on all of them.

Knows nothing about what is timed.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial

import numpy as np


def _nothing(at: int) -> None:
    """Most sides have nothing to prepare."""


def _silent(line: str) -> None:
    """Whoever times in microseconds wants no lines between."""


@dataclass(frozen=True)
class TimedSide:
    """One way to do it.

    Attributes:
        work: what is timed; told the number of the repeat.
        prepare: what comes before it and is not timed.
        every: its turn comes only in every so many repeats.
    """

    work: Callable[[int], object]
    prepare: Callable[[int], object] = _nothing
    every: int = 1


def interleaved(
    sides: Mapping[str, TimedSide], repeats: int, say: Callable[[str], object] = _silent
) -> dict[str, list[float]]:
    """Return seconds per call of each side.

    Every repeat gives each side its turn. The first repeat, and each that follows the turn of a rare side, is not
    counted: the caches are somebody else's then.

    Args:
        sides: what is compared, by name.
        repeats: how many turns of each side are counted.
        say: hears every repeat's seconds.
    """
    seconds: dict[str, list[float]] = {name: [] for name in sides}
    at, counted, cold = 0, 0, True
    while counted < repeats:
        rare, told = False, []
        for name, side in sides.items():
            if (side.every == 1) if cold else (counted % side.every == side.every - 1):
                side.prepare(at)
                taken = seconds_of(partial(side.work, at))
                seconds[name] += [] if cold else [taken]
                told.append(f"{name} {taken:.3g} s")
                rare = rare or side.every > 1
        counted += not cold
        say(f"{'warm-up' if cold else f'repeat {counted} of {repeats}'}: {', '.join(told)}")
        at, cold = at + 1, rare
    return seconds


def seconds_of(work: Callable[[], object]) -> float:
    """Return how long one call takes."""
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def percentile(values: list[float], share: float) -> float:
    """Return the value below which `share` percent of the values lie."""
    return float(np.percentile(values, share))
