"""The LRU cache against a list, and its stationary content against a long run and Che's approximation."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.optimize import brentq

from proper.simulation.activity import ZipfLaw
from proper.simulation.lru import LruKeys, fill_stationary


@given(keys=st.lists(st.integers(0, 9), max_size=60), capacity=st.integers(1, 6))
def test_it_keeps_what_a_list_keeps(keys: list[int], capacity: int) -> None:
    cache, kept = LruKeys(capacity), list[int]()
    for key in keys:
        assert (key in cache) == (key in kept)
        if key in kept:
            kept.remove(key)
            cache.touch(key)
        else:
            assert cache.make_room()
            cache.add(key)
        kept.append(key)
        del kept[:-capacity]
    assert len(cache) == len(kept)


def test_pinned_and_kept_keys_stay() -> None:
    cache = LruKeys(2)
    for key in (1, 2):
        cache.add(key)
    cache.pin(1)
    assert not cache.make_room(keep={2}) and 2 in cache
    assert cache.make_room() and 2 not in cache and 1 in cache
    assert not cache.make_room(reserved=1), "the room is promised to a load"
    cache.unpin(1)
    assert cache.make_room(reserved=1) and not len(cache)


def che(law: ZipfLaw, capacity: int) -> float:
    """Return Che's approximation of the hit rate: a key stays for the same time T, at which `capacity` keys are in."""
    weights = law.weights(np.arange(1, law.users + 1))
    stay = brentq(lambda time: float(np.sum(-np.expm1(-weights * time))) - capacity, 1e-9, 1e12)
    return float(np.sum(weights * -np.expm1(-weights * stay)))


def hits(law: ZipfLaw, cache: LruKeys, count: int) -> float:
    found = 0
    for key in law.draw(np.random.default_rng(5), count).tolist():
        if key in cache:
            found += 1
            cache.touch(key)
        else:
            cache.make_room()
            cache.add(key)
    return found / count


@pytest.mark.parametrize(("exponent", "capacity"), [(0.7, 100), (1.0, 400)])
def test_the_stationary_content_needs_no_warm_up(exponent: float, capacity: int) -> None:
    law = ZipfLaw(5000, exponent, 3.0)
    cold, filled, random = LruKeys(capacity), LruKeys(capacity), np.random.default_rng(9)
    fill_stationary(filled, lambda count: law.draw(random, count), 10**6)
    assert len(filled) == capacity
    hits(law, cold, 20_000)
    long_run, at_once = hits(law, cold, 60_000), hits(law, filled, 3000)
    assert long_run == pytest.approx(che(law, capacity), abs=0.01)
    assert at_once == pytest.approx(long_run, abs=0.03)


def test_a_cache_with_more_room_than_keys_ends_its_search() -> None:
    cache, random = LruKeys(50), np.random.default_rng(0)
    fill_stationary(cache, lambda count: random.integers(1, 11, count), 5000)
    assert len(cache) == 10
