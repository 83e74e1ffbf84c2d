"""Figures of a simulated day of serving: hit rate, times to the first token, queueing, load by hour."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from proper.simulation.activity import DailyCycle
from proper.simulation.replica import NO_ADAPTER, SimulatedRequest
from proper.simulation.serving import ServedDay

SHARES = (50, 95, 99)


def serving_figures(day: ServedDay, request_seconds: float, cycle: DailyCycle) -> dict[str, Any]:
    """Return the figures of a simulated day; times are in seconds, the peak is the busiest hour and its neighbours.

    Args:
        day: what happened.
        request_seconds: time that every request takes outside the engine.
        cycle: the cycle of the requests, which gives each its hour.
    """
    jobs = day.jobs
    adapted = [job for job in jobs if job.key != NO_ADAPTER]
    hours: dict[int, list[SimulatedRequest]] = {}
    for job in jobs:
        hours.setdefault(cycle.hour(job.arrival), []).append(job)
    around = {(cycle.hour(cycle.length / 2) + step) % 24 for step in (-1, 0, 1)}
    peak = [first_token(job, request_seconds) for hour in around for job in hours.get(hour, ())]
    by_hour = [_hour(hour, found, request_seconds) for hour, found in sorted(hours.items())]
    return {
        "requests": len(jobs),
        "seconds": round(day.seconds, 1),
        "hit_rate": _share(sum(job.hit for job in adapted), len(adapted)),
        "first_token_seconds": percentiles([first_token(job, request_seconds) for job in jobs]),
        "queue_seconds": percentiles([job.started - job.arrival for job in jobs]),
        "answer_seconds": percentiles([request_seconds + job.ended - job.arrival for job in jobs]),
        "spilled": _share(sum(job.spilled for job in jobs), len(jobs)),
        "fetched": _share(day.fetched, len(adapted)),
        "busy": round(day.busy, 4),
        "rows_used": round(day.rows_used, 4),
        "peak_first_token_p95": percentiles(peak)["p95"],
        "by_hour": by_hour,
    }


def first_token(job: SimulatedRequest, request_seconds: float) -> float:
    """Return the seconds from a request's arrival to its first token."""
    return request_seconds + job.first - job.arrival


def percentiles(values: Sequence[float]) -> dict[str, float]:
    """Return p50, p95 and p99 of the values, to four digits; zeros without values."""
    found = np.percentile(values, SHARES) if len(values) else np.zeros(len(SHARES))
    return {f"p{share}": float(f"{value:.4g}") for share, value in zip(SHARES, found, strict=True)}


def _hour(hour: int, jobs: Sequence[SimulatedRequest], request_seconds: float) -> dict[str, Any]:
    firsts = percentiles([first_token(job, request_seconds) for job in jobs])
    return {"hour": hour, "requests": len(jobs), "first_token_p95": firsts["p95"]}


def _share(part: int, whole: int) -> float:
    return round(part / whole, 4) if whole else 0.0
