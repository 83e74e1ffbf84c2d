"""Simulation of a day of serving: a slice of the cluster with its share of the users, with and without affinity."""

from __future__ import annotations

import random
from collections.abc import Callable, Generator, Iterable
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import simpy
from numpy.typing import NDArray

from proper.console import Advance
from proper.simulation.activity import DAY, Arrival, DailyCycle, ZipfLaw, arrivals, hash_of
from proper.simulation.costs import ServingCosts
from proper.simulation.lru import LruKeys, fill_stationary
from proper.simulation.replica import NO_ADAPTER, SimulatedReplica, SimulatedRequest
from proper.simulation.routing import HashRing, Route, with_affinity, without_affinity
from proper.simulation.schema import ClusterConfig, SimulationConfig

VERSION = 40
"""Bit at which the version of a user's adapter begins in a key; the bits below are the user."""

REPORTED = 1000
"""Requests between two calls of the progress callback."""

FILL_DRAWS = 20
"""Draws per entry after which the search for the stationary content of a cache gives up."""


class UserKeys:
    """Keys of the users' adapters. A refit changes a user's key, so that the old version has to be loaded anew.

    Args:
        adapted: share of the users with an adapter.
        per_request: share of the requests after which the user is refitted before the next request.
        seed: seed of the draws.
    """

    def __init__(self, adapted: float, per_request: float, seed: int) -> None:
        self._adapted, self._refitted = adapted * 2.0**64, per_request * 2.0**64
        self._per_request, self._random = per_request, random.Random(seed)
        self._versions: dict[int, int] = {}

    def of(self, user: int) -> int:
        """Return the key of a user's request; may give the user a new version for the next one."""
        if not self.has_adapter(user):
            return NO_ADAPTER
        version = self._versions.get(user)
        if version is None:  # the user's last request before the simulation may have led to a refit, too
            version = int(hash_of(~user) < self._refitted)
            self._versions[user] = version
        if self._random.random() < self._per_request:
            self._versions[user] = version + 1
        return user | version << VERSION

    def has_adapter(self, user: int) -> bool:
        """Whether a user has an adapter."""
        return self._adapted >= 2.0**64 or hash_of(user << 1) < self._adapted


@dataclass(frozen=True)
class ServedDay:
    """What happened in a simulated day.

    Attributes:
        jobs: all requests.
        seconds: simulated seconds.
        busy, rows_used: share of the time in forward passes, and mean rows in use over all rows.
        fetched: adapters fetched from elsewhere to a local disk.
    """

    jobs: list[SimulatedRequest]
    seconds: float
    busy: float
    rows_used: float
    fetched: int


def serve_requests(
    requests: Iterable[Arrival],
    cluster: ClusterConfig,
    costs: ServingCosts,
    keys: Callable[[int], int],
    *,
    replicas: int,
    affinity: bool = True,
    seed: int = 0,
    prepare: Callable[[int, SimulatedReplica], None] | None = None,
    advance: Advance | None = None,
) -> ServedDay:
    """Simulate the serving of requests, in order of time, until the last one is answered.

    Args:
        requests: the requests.
        cluster: limits of a replica, and when a full one spills.
        costs: seconds of everything that a replica does.
        keys: returns the adapter that a user's request needs.
        replicas: number of replicas.
        affinity: consistent hashing on the user; otherwise two random choices.
        seed: seed of routing and of the variation of times.
        prepare: fills the caches of a replica, given its number, before the first request.
        advance: progress callback.
    """
    env = simpy.Environment()
    jobs: list[SimulatedRequest] = []
    each = np.random.default_rng([seed, 2]).spawn(replicas)
    machines = [SimulatedReplica(env, costs, cluster, random, jobs.append) for random in each]
    for number, machine in enumerate(machines):
        if prepare is not None:
            prepare(number, machine)
    route: Route = without_affinity(machines, seed)
    if affinity:
        route = with_affinity(HashRing(replicas), machines, cluster.spill)
    env.process(_source(env, requests, route, machines, keys, advance))
    env.run()
    seconds = max(env.now, 1e-9)
    return ServedDay(
        jobs,
        seconds,
        sum(machine.busy for machine in machines) / (replicas * seconds),
        sum(machine.row_seconds for machine in machines) / (replicas * cluster.rows * seconds),
        sum(machine.fetched for machine in machines),
    )


def _source(
    env: simpy.Environment,
    requests: Iterable[Arrival],
    route: Route,
    machines: list[SimulatedReplica],
    keys: Callable[[int], int],
    advance: Advance | None,
) -> Generator[simpy.Event, Any, None]:
    for number, request in enumerate(requests):
        yield env.timeout(max(0.0, request.time - env.now))
        at, spilled = route(request.user)
        machines[at].submit(SimulatedRequest(env.now, keys(request.user), request.prompt, request.answer, spilled))
        if advance is not None and (number + 1) % REPORTED == 0:
            advance(REPORTED)


@dataclass(frozen=True)
class ClusterSlice:
    """The simulated part of the cluster.

    Attributes:
        replicas: simulated replicas.
        share: their share of all replicas.
        law: activity of their users: with affinity of every (1 / share)-th user, without of all users.
        cycle: their requests over the simulated day.
    """

    replicas: int
    share: float
    law: ZipfLaw
    cycle: DailyCycle

    @classmethod
    def of(cls, config: SimulationConfig, replicas: int, *, affinity: bool) -> ClusterSlice:
        """Return the slice of a cluster of `replicas` replicas that `config.sample` asks for."""
        activity = config.activity
        simulated = min(config.sample.replicas, replicas)
        share = simulated / replicas
        law = ZipfLaw(config.users, activity.zipf, activity.shift)
        rate = config.users * activity.requests_per_user_day / DAY * share
        length = min(DAY, config.sample.requests / rate)
        cycle = DailyCycle(rate, activity.daily_swing, activity.peak_hour, length)
        return cls(simulated, share, law.slice(share) if affinity else law, cycle)

    def at_peak(self, requests: int) -> ClusterSlice:
        """Return the slice with a constant load, that of the busiest hour, and so many requests."""
        rate = self.cycle.rate * (1 + self.cycle.swing)
        cycle = DailyCycle(rate, 0.0, self.cycle.peak_hour, requests / rate)
        return ClusterSlice(self.replicas, self.share, self.law, cycle)


def simulate_slice(
    config: SimulationConfig, costs: ServingCosts, part: ClusterSlice, *, affinity: bool, advance: Advance | None = None
) -> ServedDay:
    """Simulate the requests of a slice, from caches with their stationary content."""
    keys = UserKeys(config.activity.adapted, config.refits.per_request, config.seed)
    ring = HashRing(part.replicas)
    random = np.random.default_rng([config.seed, 3])

    def draw(home: int | None, count: int) -> NDArray[np.int64]:
        users = part.law.draw(random, count)
        return np.array([u for u in users.tolist() if keys.has_adapter(u) and home in (None, ring.home(u))], np.int64)

    def prepare(number: int, machine: SimulatedReplica) -> None:
        own = partial(draw, number if affinity else None)
        for cache in (machine.slots, machine.local):
            if isinstance(cache, LruKeys):
                fill_stationary(cache, own, FILL_DRAWS * part.replicas * cache.capacity)

    requests = arrivals(part.law, part.cycle, config.activity, config.seed)
    return serve_requests(
        requests,
        config.cluster,
        costs,
        keys.of,
        replicas=part.replicas,
        affinity=affinity,
        seed=config.seed,
        prepare=prepare,
        advance=advance,
    )
