"""Costs of serving for `proper simulate`: a decoding step by batch size, prefill by tokens, a cold load."""

from __future__ import annotations

import statistics
import time
from typing import Any

import numpy as np
import torch

from proper.adapters.load import RowLoader
from proper.benchmarks.serve_loads import Times, answer_all
from proper.benchmarks.serve_setup import Served
from proper.inference.engine import Engine
from proper.inference.requests import EngineLimits

LOADS = 64
"""Number of timed cold loads."""


def serving_costs(served: Served, rows: int, answer: int, repeats: int) -> dict[str, Any]:
    """Return the costs under the keys of the section `costs` of `proper simulate`, in seconds.

    A step is the time between two tokens of a batch; the median of all its steps counts. A prefill is the time to the
    first token of a batch whose adapters are in slots; base and time per token, padding included, are a least-squares
    line through all batches. `variation` is the coefficient of variation of a step, the median over batch sizes.

    Args:
        served: the model and its users.
        rows: the largest batch; the others are powers of two.
        answer: tokens per answer.
        repeats: number of answers of each batch; the sizes take turns.
    """
    served.mix(True)
    sizes = [size for size in (1 << power for power in range(12)) if size < rows] + [rows]
    engine = Engine(served.personal, EngineLimits(rows, slots=rows, prefill=1 << 30, prefix_bytes=0))
    gaps: dict[int, list[float]] = {size: [] for size in sizes}
    prefills: list[tuple[float, float]] = []
    for repeat in range(repeats + 1):
        for size in reversed(sizes):  # the largest first: it loads all adapters
            times: Times = []
            answer_all(engine, served.prompts[:size], served.names[:size], answer, times)
            if repeat:
                one = times[0]
                gaps[size] += [after - before for before, after in zip(one, one[1:], strict=False)]
                width = max(len(prompt) for prompt in served.prompts[:size])
                prefills.append((float(width * size), max(stamps[0] for stamps in times)))
    engine.close()
    base, slope = line(prefills)
    spread = [statistics.pstdev(found) / statistics.fmean(found) for found in gaps.values() if found]
    return {
        "step_seconds": {str(size): _short(statistics.median(found)) for size, found in gaps.items() if found},
        "prefill_seconds": _short(base),
        "prefill_token_seconds": _short(slope),
        "load_seconds": _short(_cold_load(served)),
        "variation": _short(statistics.median(spread)) if spread else 0.0,
    }


def line(points: list[tuple[float, float]]) -> tuple[float, float]:
    """Return intercept and slope of the least-squares line through (x, y) points, both at least 0."""
    x, y = np.array(points).T
    spread = float(((x - x.mean()) ** 2).sum())
    slope = max(0.0, float(((x - x.mean()) * (y - y.mean())).sum()) / spread) if spread else 0.0
    base = float(y.mean() - slope * x.mean())
    if base < 0:  # through the origin instead
        return 0.0, float((x * y).sum() / (x * x).sum())
    return base, slope


def _cold_load(served: Served) -> float:
    """Return the median seconds from the page cache into a slot."""
    loader, seconds = RowLoader(served.store, served.layout), list[float]()
    slot = torch.empty(served.layout.width, device=served.device, dtype=served.shape.dtype)
    for at in range(LOADS):
        begun = time.perf_counter()
        loader.load(served.names[at % len(served.names)], slot)
        seconds.append(time.perf_counter() - begun)
    return statistics.median(seconds)


def _short(value: float) -> float:
    return float(f"{value:.4g}")
