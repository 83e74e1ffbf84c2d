"""Consistent hashing: fair shares, few moves, spill only where the user's replica is full."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import Any

import pytest

from proper.simulation.routing import HashRing, with_affinity, without_affinity


@dataclass
class Load:
    waiting: int = 0
    running: int = 0

    @property
    def outstanding(self) -> int:
        return self.waiting + self.running


def test_users_are_spread_evenly_and_few_move_to_a_new_replica() -> None:
    before, after = HashRing(7), HashRing(8)
    homes = Counter(before.home(user) for user in range(20_000))
    assert max(homes.values()) < 1.25 * 20_000 / 7
    moved = [after.home(user) for user in range(20_000) if before.home(user) != after.home(user)]
    assert {*moved} == {7}, "a user stays, or moves to the new replica"
    assert len(moved) / 20_000 == pytest.approx(1 / 8, abs=0.03)


def test_the_second_replica_is_another_one() -> None:
    ring = HashRing(3)
    assert all(len({*ring.candidates(user)}) == 2 for user in range(200))
    assert HashRing(1).candidates(5) == (0, 0)


def test_a_request_spills_only_from_a_full_replica_to_a_less_loaded_one() -> None:
    ring, machines = HashRing(2), [Load(), Load()]
    replicas: Any = machines
    route, home = with_affinity(ring, replicas, spill=4), ring.home(1)
    machines[home].running = 30
    machines[home].waiting = 3
    assert route(1) == (home, False), "busy, and not full"
    machines[home].waiting = 4
    assert route(1) == (1 - home, True)
    machines[1 - home].running = 40
    assert route(1) == (home, False), "the other one is more loaded"


def test_without_affinity_the_less_loaded_of_two_is_taken() -> None:
    replicas: Any = [Load(running=9), Load(), Load(running=9)]
    route = without_affinity(replicas, seed=0)
    taken = Counter(route(1)[0] for _ in range(3000))
    assert taken[1] / 3000 == pytest.approx(1 - (2 / 3) ** 2, abs=0.03), "taken whenever it is one of the two"
