"""Simulation of refits: users become due, fit workers take them in order of time, some miss their deadline."""

from __future__ import annotations

import math
from collections.abc import Generator
from dataclasses import dataclass
from typing import Any

import numpy as np
import simpy

from proper.console import Advance
from proper.simulation.activity import DAY, DailyCycle, ZipfLaw
from proper.simulation.figures import percentiles
from proper.simulation.schema import SimulationConfig

DAYS = 2
"""Simulated days; the first one only builds up the queue."""


@dataclass
class _Queue:
    """Users who wait for a refit, and the hours that those who became due on the last day took."""

    waiting: set[int]
    hours: list[float]
    coalesced: int = 0


def simulate_refits(
    config: SimulationConfig, fit_seconds: float, workers: int, advance: Advance | None = None
) -> dict[str, Any]:
    """Return the figures of `workers` fit workers over a day of refits.

    A slice of the workers is simulated with its share of the users, `config.sample.requests` refits a day at most. A
    user who becomes due while waiting for a refit already is refitted once; a refit takes `fit_seconds` of one worker.

    Args:
        config: the settings.
        fit_seconds: seconds of a worker per user.
        workers: number of fit workers.
        advance: progress callback, called with the number of refits.

    Returns:
        "workers", "due" (a day, all users), "missed" (share that ended after the deadline), "hours" (percentiles from
        becoming due to the end), "busy" (load over capacity: above 1 the queue grows from day to day).
    """
    due = daily_refits(config)
    load = due * fit_seconds / (workers * DAY)
    simulated = min(workers, max(1, math.floor(workers * config.sample.requests / max(due, 1.0))))
    # Where even one worker's refits are too many, one event stands for `group` users, who take that many times as long:
    # their order within seconds does not matter beside a deadline of hours.
    group = max(1.0, due * simulated / workers / config.sample.requests)
    share = simulated / workers / group
    law = ZipfLaw(config.users, config.activity.zipf, config.activity.shift).slice(share)
    queue = _Queue(set(), [])
    if due:
        env = simpy.Environment()
        cycle = DailyCycle(due * share / DAY, config.activity.daily_swing, config.activity.peak_hour)
        pool = simpy.Resource(env, simulated)
        random = np.random.default_rng([config.seed, 4])
        env.process(_due_users(env, cycle, law, queue, pool, group * fit_seconds, random, advance))
        env.run()
    deadline = config.refits.deadline_hours
    missed = sum(hours > deadline for hours in queue.hours) / max(1, len(queue.hours))
    return {
        "workers": workers,
        "due": round(due),
        "missed": round(missed, 4),
        "hours": percentiles(queue.hours),
        "busy": round(load, 4),
    }


def daily_refits(config: SimulationConfig) -> float:
    """Return the number of times that users become due for a refit in a day."""
    activity = config.activity
    return config.users * activity.requests_per_user_day * activity.adapted * config.refits.per_request


def _due_users(
    env: simpy.Environment,
    cycle: DailyCycle,
    law: ZipfLaw,
    queue: _Queue,
    pool: simpy.Resource,
    fit_seconds: float,
    random: np.random.Generator,
    advance: Advance | None,
) -> Generator[simpy.Event, Any, None]:
    for day in range(DAYS):
        for times in cycle.times(random):
            users = law.draw(random, len(times)).tolist()
            for time, user in zip(times.tolist(), users, strict=True):
                yield env.timeout(max(0.0, day * DAY + time - env.now))
                if user in queue.waiting:
                    queue.coalesced += 1
                    continue
                queue.waiting.add(user)
                env.process(_refit(env, user, queue, pool, fit_seconds, counted=day == DAYS - 1))
            if advance is not None:
                advance(len(times))


def _refit(
    env: simpy.Environment, user: int, queue: _Queue, pool: simpy.Resource, fit_seconds: float, *, counted: bool
) -> Generator[simpy.Event, Any, None]:
    due = env.now
    with pool.request() as turn:
        yield turn
        queue.waiting.discard(user)  # interactions from now on need another refit
        yield env.timeout(fit_seconds)
    if counted:
        queue.hours.append((env.now - due) / 3600)
