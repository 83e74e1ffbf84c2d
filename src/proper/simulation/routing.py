"""Routing of requests to replicas: consistent hashing on the user with spill, or two random choices."""

from __future__ import annotations

import random
from bisect import bisect
from collections.abc import Callable, Sequence

import numpy as np

from proper.simulation.activity import hash_of, mixed_bits
from proper.simulation.replica import SimulatedReplica

Route = Callable[[int], tuple[int, bool]]
"""Returns the replica of a user's request, and whether it is another one than the user's own."""

POINTS = 256
"""Points of each replica on the ring; the largest share of users is about 1 + 3 / sqrt(POINTS) times the mean."""


class HashRing:
    """Consistent hashing: each replica has `POINTS` points on a ring; a user belongs to the next point's replica."""

    def __init__(self, replicas: int) -> None:
        self.replicas = replicas
        points = np.arange(replicas * POINTS, dtype=np.uint64) + np.uint64(1 << 48)
        hashes = mixed_bits(points)
        order = np.argsort(hashes)
        self._hashes: list[int] = hashes[order].tolist()
        self._owners: list[int] = (order // POINTS).tolist()

    def home(self, user: int) -> int:
        """Return the user's replica."""
        return self._owners[self._at(user)]

    def candidates(self, user: int) -> tuple[int, int]:
        """Return the user's replica and the next other one on the ring; the same one if there is no other."""
        at = self._at(user)
        home = self._owners[at]
        if self.replicas == 1:
            return home, home
        while True:
            at = (at + 1) % len(self._owners)
            if self._owners[at] != home:
                return home, self._owners[at]

    def _at(self, user: int) -> int:
        return bisect(self._hashes, hash_of(user)) % len(self._hashes)


def with_affinity(ring: HashRing, replicas: Sequence[SimulatedReplica], spill: int) -> Route:
    """Return the route to the user's replica, or, where `spill` requests wait there, to the less loaded of two."""

    def route(user: int) -> tuple[int, bool]:
        home, second = ring.candidates(user)
        if replicas[home].waiting < max(1, spill) or replicas[second].outstanding >= replicas[home].outstanding:
            return home, False
        return second, True

    return route


def without_affinity(replicas: Sequence[SimulatedReplica], seed: int) -> Route:
    """Return the route to the less loaded of two random replicas, the same for all users."""
    draw = random.Random(seed)
    count = len(replicas)

    def route(user: int) -> tuple[int, bool]:
        first, second = draw.randrange(count), draw.randrange(count)
        return (first if replicas[first].outstanding <= replicas[second].outstanding else second), False

    return route
