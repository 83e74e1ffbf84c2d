"""One simulated replica: the steps of the engine (`inference/engine.py`) as a simpy process.

    step:  start adapter loads -> decode one token per row -> prefill requests whose adapters are loaded

As in the engine, loads of waiting requests run beside decoding, no load evicts the adapter of an earlier request, a
request whose adapter is loaded overtakes others at most `patience` times, and running rows wait during a prefill. While
nothing waits, decoding steps are one event up to the next end of a row; an arrival cuts them at the end of the current
step. The number of events therefore grows with the requests, not with the tokens.
"""

from __future__ import annotations

import heapq
import itertools
import math
from collections import OrderedDict
from collections.abc import Callable, Generator
from dataclasses import dataclass
from typing import Any

import numpy as np
import simpy

from proper.simulation.costs import ServingCosts
from proper.simulation.lru import LruKeys
from proper.simulation.schema import ClusterConfig

NO_ADAPTER = -1
UNREADY_SCANNED = 4
"""A prefill looks past at most this many times `slots` requests that wait for a load, to bound a step's work."""

Steps = Generator[simpy.Event, Any, None]


@dataclass(eq=False, slots=True)
class SimulatedRequest:
    """A request in the simulation; times are seconds of simulated time.

    Attributes:
        arrival: when it reached the replica.
        key: its adapter, a version of its user's; `NO_ADAPTER` if it needs none.
        prompt, answer: numbers of tokens.
        spilled: whether it was sent to another replica than its user's.
        hit: whether its adapter was in a slot when it arrived.
        passed: how often it was overtaken.
        started, first, ended: when its prefill began, its first token came, its last token came.
    """

    arrival: float
    key: int
    prompt: int
    answer: int
    spilled: bool = False
    hit: bool = True
    passed: int = 0
    started: float = 0.0
    first: float = 0.0
    ended: float = 0.0


class SimulatedReplica:
    """A replica with `cluster.rows` rows and `cluster.slots` slots.

    Args:
        env: the simulation's clock.
        costs: seconds of everything that it does.
        cluster: its limits.
        random: source of the variation of times.
        done: called with each request that has its last token.

    Attributes:
        slots, local: adapters in slots and on the local disk; `local` is None where every adapter is there.
        busy: seconds spent in forward passes so far.
        row_seconds: rows times seconds of decoding so far.
        fetched: adapters fetched from elsewhere so far.
    """

    def __init__(
        self,
        env: simpy.Environment,
        costs: ServingCosts,
        cluster: ClusterConfig,
        random: np.random.Generator,
        done: Callable[[SimulatedRequest], None],
    ) -> None:
        self.slots = LruKeys(cluster.slots)
        self.local = None if cluster.local_adapters == "all" else LruKeys(cluster.local_adapters)
        self.busy = self.row_seconds = 0.0
        self.fetched = self.loads = 0
        self._env, self._costs, self._cluster, self._random, self._done = env, costs, cluster, random, done
        self._waiting: OrderedDict[SimulatedRequest, None] = OrderedDict()
        self._running: list[tuple[int, int, SimulatedRequest]] = []
        """Heap of (step after which the row ends, number, request)."""
        self._steps, self._numbers = 0, itertools.count()
        self._loading: dict[int, float] = {}
        self._free_loaders = [0.0] * cluster.loaders
        self._resting, self._changed = False, False
        self._process = env.process(self._run())

    @property
    def waiting(self) -> int:
        """Number of requests without a row."""
        return len(self._waiting)

    @property
    def outstanding(self) -> int:
        """Number of requests that are waiting or running."""
        return len(self._waiting) + len(self._running)

    def submit(self, job: SimulatedRequest) -> None:
        """Take a request that arrives now."""
        job.hit = job.key == NO_ADAPTER or job.key in self.slots
        self._waiting[job] = None
        self._changed = True
        if self._resting:
            self._resting = False
            self._process.interrupt()

    def _run(self) -> Steps:
        while True:
            self._collect()
            self._prefetch()
            if self._running:
                yield from self._decode()
                self._collect()
            elif not any(self._ready(job) for job in self._waiting):
                yield from self._rest()
                continue
            started = self._take()
            if started:
                yield from self._prefill(started)

    def _rest(self) -> Steps:
        """Wait for a load to end or a request to arrive."""
        self._resting = True
        try:
            if self._loading:
                yield self._env.timeout(max(0.0, min(self._loading.values()) - self._env.now))
            else:
                yield self._env.event()
        except simpy.Interrupt:
            return
        self._resting = False

    def _decode(self) -> Steps:
        """Decode until a row ends or a request arrives; one step only while requests wait."""
        rows = len(self._running)
        count = 1 if self._waiting else self._running[0][0] - self._steps
        begun, seconds = self._env.now, self._time(count * self._costs.steps[rows - 1], count)
        self._resting = count > 1
        try:
            yield self._env.timeout(seconds)
            self._resting = False
        except simpy.Interrupt:
            share = (self._env.now - begun) / seconds if seconds else 1.0
            done = min(count, max(1, math.ceil(share * count - 1e-9)))
            seconds *= done / count
            count = done
            yield self._env.timeout(max(0.0, begun + seconds - self._env.now))
        self.busy += seconds
        self.row_seconds += rows * seconds
        self._steps += count
        while self._running and self._running[0][0] <= self._steps:
            self._end(heapq.heappop(self._running)[2])

    def _prefill(self, started: list[SimulatedRequest]) -> Steps:
        width = max(job.prompt for job in started)
        mean = self._costs.prefill + self._costs.prefill_token * width * len(started)
        seconds = self._time(mean, 1)
        yield self._env.timeout(seconds)
        self.busy += seconds
        for job in started:
            job.first = self._env.now
            if job.answer <= 1:
                self._end(job)
            else:
                heapq.heappush(self._running, (self._steps + job.answer - 1, next(self._numbers), job))

    def _end(self, job: SimulatedRequest) -> None:
        job.ended = self._env.now
        if job.key != NO_ADAPTER:
            self.slots.unpin(job.key)
            self._changed = True
        self._done(job)

    def _take(self) -> list[SimulatedRequest]:
        """Remove and return the requests that get a row now; see `inference/request_queue.py`."""
        free, budget = self._cluster.rows - len(self._running), self._cluster.prefill_tokens
        taken: list[SimulatedRequest] = []
        unready: list[SimulatedRequest] = []
        longest, most = 0, UNREADY_SCANNED * self._cluster.slots
        for job in self._waiting:
            width = max(longest, job.prompt)
            if len(taken) == free or (taken and width * (len(taken) + 1) > budget) or len(unready) > most:
                break
            if unready and max(other.passed for other in unready) >= self._cluster.patience:
                break
            if not self._ready(job):
                unready.append(job)
                continue
            for other in unready:
                other.passed += 1
            taken.append(job)
            longest = width
        for job in taken:
            del self._waiting[job]
            job.started = self._env.now
            if job.key != NO_ADAPTER:
                self.slots.pin(job.key)
        return taken

    def _ready(self, job: SimulatedRequest) -> bool:
        return job.key == NO_ADAPTER or job.key in self.slots

    def _prefetch(self) -> None:
        """Start loads of waiting requests in queue order; no load evicts the adapter of an earlier request."""
        if not self._changed:
            return
        self._changed = False
        keep: set[int] = set()
        for job in self._waiting:
            if job.key == NO_ADAPTER:
                continue
            if len(keep) == self._cluster.slots or not self._load(job.key, keep):
                break
            keep.add(job.key)

    def _load(self, key: int, keep: set[int]) -> bool:
        """Start a load unless the adapter is there or loading; False if no slot can be freed for it."""
        if key in self.slots or key in self._loading:
            return True
        if not self.slots.make_room(len(self._loading), keep):
            return False
        start = max(self._env.now, heapq.heappop(self._free_loaders))
        end = start + self._costs.load + (0.0 if self._is_local(key) else self._costs.remote)
        heapq.heappush(self._free_loaders, end)
        self._loading[key] = end
        self.loads += 1
        return True

    def _is_local(self, key: int) -> bool:
        """Whether an adapter is on the local disk; it is from now on."""
        if self.local is None:
            return True
        if key in self.local:
            self.local.touch(key)
            return True
        self.fetched += 1
        self.local.make_room()
        self.local.add(key)
        return False

    def _collect(self) -> None:
        """Put the adapters whose loads have ended into their slots."""
        now = self._env.now
        for key in [key for key, end in self._loading.items() if end <= now]:
            del self._loading[key]
            self.slots.add(key)
            self._changed = True

    def _time(self, mean: float, count: int) -> float:
        """Return the time of `count` forward passes: a gamma variable, whose sums are gamma variables again."""
        spread = self._costs.variation**2
        if not spread or not mean:
            return mean
        return float(self._random.gamma(count / spread, mean * spread / count))
