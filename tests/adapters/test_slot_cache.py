"""Adapters in bank slots: which are loaded, pinned and evicted, and what a changed or damaged adapter does."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from proper.adapters.quantization import encode
from proper.adapters.slot_cache import AdapterKey, LoadResult, SlotCache
from proper.adapters.store import AdapterStore, UserRecord
from proper.errors import StoreError
from proper.layers.bank import AdapterBank
from proper.layers.layout import Layout

SLOTS = 3
Adapter = Callable[[int], dict[str, Tensor]]


def cache_of(store: AdapterStore, layout: Layout, slots: int) -> SlotCache:
    return SlotCache(lambda tenant: store, AdapterBank(layout, slots, alpha=4.0, trainable=False))


@pytest.fixture
def cache(filled: AdapterStore, layout: Layout) -> Iterator[SlotCache]:
    made = cache_of(filled, layout, 2)
    yield made
    made.close()


def key_of(store: AdapterStore, user: str) -> AdapterKey:
    key = AdapterKey.of("", user, store.head(user))
    assert key is not None
    return key


def keys_of(store: AdapterStore, *users: str | None) -> list[AdapterKey | None]:
    return [None if user is None else AdapterKey.of("", user, store.head(user)) for user in users]


def stored_row(store: AdapterStore, layout: Layout, user: str) -> Tensor:
    """What a slot with a user's adapter should contain."""
    record = store.get(user)
    assert record is not None and record.adapter is not None
    row = torch.empty(layout.width)
    layout.pack(record.adapter, row)
    return row


def collected(cache: SlotCache) -> list[LoadResult]:
    found: list[LoadResult] = []
    while cache.loading:
        found += cache.collect()
        time.sleep(0.001)
    return found


def load(cache: SlotCache, *keys: AdapterKey) -> list[LoadResult]:
    for key in keys:
        assert cache.load(key, keys)
    return collected(cache)


@dataclass
class Oracle:
    """The same cache as a list of keys, the least recently used first."""

    slots: int
    keys: list[AdapterKey] = field(default_factory=list)
    pins: list[AdapterKey] = field(default_factory=list)
    rows: dict[AdapterKey, Tensor] = field(default_factory=dict)
    loads: int = 0
    evictions: int = 0

    def fetch(self, keys: Sequence[AdapterKey]) -> bool:
        """Whether all of these adapters get a slot."""
        wanted = list(dict.fromkeys(keys))
        if len(wanted) > self.slots:
            return False
        for key in [key for key in wanted if key in self.keys]:
            self.touch(key)
        missing = [key for key in wanted if key not in self.keys]
        for number, key in enumerate(missing):
            if len(self.keys) == self.slots:
                evictable = [old for old in self.keys if old not in self.pins and old not in wanted]
                if not evictable:
                    return number == len(missing)
                self.keys.remove(evictable[0])
                self.evictions += 1
            self.keys.append(key)
            self.loads += 1
        return True

    def touch(self, key: AdapterKey) -> None:
        self.keys.remove(key)
        self.keys.append(key)

    def forget(self, user: str) -> None:
        self.keys = [key for key in self.keys if key.user != user or key in self.pins]


OPERATIONS = st.lists(
    st.one_of(
        st.tuples(st.just("fetch"), st.lists(st.integers(0, 4), min_size=1, max_size=5)),
        st.tuples(st.sampled_from(["pin", "unpin", "update", "forget"]), st.integers(0, 4)),
    ),
    max_size=25,
)


@given(operations=OPERATIONS)
@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_sequence_of_calls_agrees_with_a_list(
    filled: AdapterStore, layout: Layout, adapter: Adapter, operations: list[tuple[str, Any]]
) -> None:
    cache, oracle = cache_of(filled, layout, SLOTS), Oracle(SLOTS)
    forgotten: set[AdapterKey] = set()
    for at, (name, value) in enumerate(operations):
        if name == "fetch":
            keys = [key_of(filled, f"u{number}") for number in value]
            oracle.rows |= {key: stored_row(filled, layout, key.user) for key in keys}
            if oracle.fetch(keys):
                slots = cache.fetch(keys)
                assert all(torch.equal(cache.bank.values[s], oracle.rows[k]) for k, s in zip(keys, slots, strict=True))
            else:
                with pytest.raises(StoreError, match="users in one batch"):
                    cache.fetch(keys)
        elif name == "pin" and (own := [key for key in oracle.keys if key.user == f"u{value}"]):
            oracle.touch(own[-1])
            oracle.pins.append(own[-1])
            assert torch.equal(cache.bank.values[cache.pin(own[-1])], oracle.rows[own[-1]])
        elif name == "unpin" and (own := [key for key in oracle.pins if key.user == f"u{value}"]):
            oracle.pins.remove(own[0])
            cache.unpin(own[0])
            if own[0] in forgotten and own[0] not in oracle.pins:
                oracle.keys.remove(own[0])
                forgotten.remove(own[0])
        elif name == "update":
            filled.put([UserRecord(f"u{value}", "users", torch.zeros(3), adapter(100 + at))])
        elif name == "forget":
            oracle.forget(f"u{value}")
            forgotten |= {key for key in oracle.keys if key.user == f"u{value}"}
            cache.forget("", f"u{value}")
        assert list(cache._slots) == oracle.keys
        assert cache.pinned == len(set(oracle.pins)) and len(cache) == len(oracle.keys)
        assert (cache.counts.loads, cache.counts.evictions) == (oracle.loads, oracle.evictions)
    cache.close()


def test_rows_without_an_adapter_get_no_slot(filled: AdapterStore, cache: SlotCache) -> None:
    assert cache.fetch(keys_of(filled, "u1", None, "stranger", "g", "u1")) == [0, -1, -1, -1, 0]
    assert cache.fetch(keys_of(filled, None, "g")) == [-1, -1]


def test_the_least_recently_used_makes_room(filled: AdapterStore, cache: SlotCache) -> None:
    def slots(*users: str) -> list[int]:
        return cache.fetch(keys_of(filled, *users))

    assert slots("u0", "u1", "u0") == [0, 1, 0]
    assert slots("u0") == [0]
    assert slots("u2") == [1], "u1 was used longest ago"
    assert slots("u3", "u2") == [0, 1], "u2 stays: it is in the batch"
    assert sorted(slots("u1", "u0")) == [0, 1]


def test_an_adapter_of_another_shape_is_named(filled: AdapterStore, layout: Layout, cache: SlotCache) -> None:
    filled.put([UserRecord("odd", "users", torch.zeros(3), {"h.*.up.A": torch.zeros(2)})])
    with pytest.raises(StoreError, match="the adapter of user 'odd' does not fit"):
        cache.fetch(keys_of(filled, "odd"))
    cache.fetch(keys_of(filled, "u0"))
    with pytest.raises(StoreError, match="'odd'"):
        cache.fetch(keys_of(filled, "u0", "odd"))
    for user, slot in zip(["u0", "u1"], cache.fetch(keys_of(filled, "u0", "u1")), strict=True):
        assert torch.equal(cache.bank.values[slot], stored_row(filled, layout, user)), "the failed load left a trace"


def test_bf16_adapters_are_widened(store: AdapterStore, layout: Layout, adapter: Adapter) -> None:
    low = {name: tensor.bfloat16() for name, tensor in adapter(3).items()}
    store.put([UserRecord("a", "users", torch.zeros(3), low)])
    cache = cache_of(store, layout, 1)
    cache.fetch(keys_of(store, "a"))
    assert cache.bank.values.dtype == torch.float32
    assert torch.equal(cache.bank.down["h.1.up"][0], low["h.*.up.A"][1].float())
    cache.close()


def test_int8_adapters_are_decoded(store: AdapterStore, layout: Layout, adapter: Adapter) -> None:
    store.put([UserRecord("a", "users", torch.zeros(3), encode(adapter(3), "int8"))])
    cache = cache_of(store, layout, 1)
    cache.fetch(keys_of(store, "a"))
    assert torch.equal(cache.bank.values[0], stored_row(store, layout, "a"))
    error = cache.bank.down["h.1.up"][0] - adapter(3)["h.*.up.A"][1]
    assert 0 < error.norm() < 0.01 * adapter(3)["h.*.up.A"][1].norm()
    cache.close()


def test_a_change_of_the_store_is_noticed(filled: AdapterStore, cache: SlotCache, adapter: Adapter) -> None:
    def serves(seed: int) -> bool:
        (slot,) = cache.fetch(keys_of(filled, "u1"))
        return torch.equal(cache.bank.down["h.0.up"][slot], adapter(seed)["h.*.up.A"][0])

    assert serves(1)
    filled.put([UserRecord("u1", "users", torch.zeros(3), adapter(20))])
    assert serves(20)
    filled.rollback("u1")
    assert serves(1)
    filled.delete("u1")
    assert cache.fetch(keys_of(filled, "u1")) == [-1]
    filled.put([UserRecord("u1", "users", torch.zeros(3), adapter(21))])
    assert serves(21), "version 1 again, and another adapter"


def test_fetch_returns_the_newer_version_and_fails_for_a_deleted_user(
    filled: AdapterStore, layout: Layout, cache: SlotCache, adapter: Adapter
) -> None:
    old, gone = key_of(filled, "u0"), key_of(filled, "u3")
    filled.put([UserRecord("u0", "users", torch.zeros(3), adapter(30))])
    (slot,) = cache.fetch([old])
    assert torch.equal(cache.bank.values[slot], stored_row(filled, layout, "u0"))
    filled.delete("u3")
    with pytest.raises(StoreError, match="user 'u3' lost their adapter"):
        cache.fetch([gone])


def test_a_damaged_adapter_frees_its_slot(filled: AdapterStore, layout: Layout) -> None:
    cache = cache_of(filled, layout, 1)
    cache.fetch(keys_of(filled, "u0"))
    (path,) = filled.paths.blobs.iterdir()
    path.write_bytes(b"\xff" * path.stat().st_size)
    with pytest.raises(StoreError, match="'u1' is missing or damaged"):
        cache.fetch(keys_of(filled, "u1"))
    assert not cache.bank.values.any() and len(cache) == 0
    cache.close()


def test_a_cleared_cache_is_empty_whatever_was_pinned_or_loading(filled: AdapterStore, cache: SlotCache) -> None:
    load(cache, key_of(filled, "u0"))
    cache.pin(key_of(filled, "u0"))
    cache.load(key_of(filled, "u1"), ())
    cache.clear()
    assert (len(cache), cache.loading, cache.pinned, cache.counts.loads) == (0, 0, 0, 0)
    assert sorted(cache.fetch(keys_of(filled, "u2", "u3"))) == [0, 1]


def test_asynchronous_loads_are_pinned_and_evicted(filled: AdapterStore, layout: Layout, cache: SlotCache) -> None:
    keys = [key_of(filled, f"u{at}") for at in range(5)]
    assert [result.error for result in load(cache, *keys[:2])] == [None, None]
    slot = cache.pin(keys[0])
    assert torch.equal(cache.bank.values[slot], stored_row(filled, layout, "u0"))
    assert not cache.load(keys[2], {keys[1]}), "one is pinned, the other kept"
    assert cache.load(keys[2], ()) and keys[1] not in cache
    collected(cache)
    assert keys[0] in cache and keys[2] in cache
    cache.unpin(keys[0])
    assert cache.load(keys[3], ()) and keys[0] not in cache, "used longest ago"
    collected(cache)
    assert (cache.counts.loads, cache.counts.evictions) == (4, 2)


def test_versions_of_one_user_side_by_side(filled: AdapterStore, layout: Layout, cache: SlotCache) -> None:
    old = key_of(filled, "u0")
    load(cache, old)
    before = cache.bank.values[cache.pin(old)].clone()
    other = filled.get("u1")
    assert other is not None
    filled.put([replace(other, user="u0")])
    new = key_of(filled, "u0")
    load(cache, new)
    assert torch.equal(cache.bank.values[cache.pin(new)], stored_row(filled, layout, "u1"))
    assert torch.equal(cache.bank.values[cache.pin(old)], before)


def test_a_load_may_find_a_newer_version_or_no_user(filled: AdapterStore, cache: SlotCache) -> None:
    requested, gone = key_of(filled, "u0"), key_of(filled, "u3")
    other = filled.get("u1")
    assert other is not None
    filled.put([replace(other, user="u0")])
    filled.delete("u3")
    newer, nothing = sorted(load(cache, requested, gone), key=lambda result: result.requested.user)
    assert newer.head is not None and newer.head.version == 2 and requested not in cache
    assert newer.key == key_of(filled, "u0") and newer.key in cache
    assert nothing.head is None and nothing.error is None and len(cache) == 1


def test_a_damaged_adapter_leaves_a_free_clean_slot(filled: AdapterStore, cache: SlotCache, adapter: Adapter) -> None:
    for blob in filled.paths.blobs.iterdir():
        blob.write_bytes(bytes(blob.stat().st_size))
    (result,) = load(cache, key_of(filled, "u0"))
    assert result.error is not None and "damaged" in result.error
    assert cache.counts.damaged == 1 and len(cache) == 0
    assert cache.bank.values.abs().sum() == 0
    filled.put([UserRecord("u0", "users", torch.zeros(3), adapter(0))])
    assert load(cache, key_of(filled, "u0"))[0].error is None


def test_forgetting_waits_for_the_last_pin(filled: AdapterStore, cache: SlotCache) -> None:
    key = key_of(filled, "u0")
    load(cache, key)
    slot = cache.pin(key)
    cache.forget("", "u0")
    cache.forget("another", "u0")
    assert cache.bank.values[slot].abs().sum() > 0
    cache.unpin(key)
    assert cache.bank.values[slot].abs().sum() == 0 and key not in cache


def test_a_user_forgotten_during_the_load_is_not_cached(filled: AdapterStore, cache: SlotCache) -> None:
    key, other = key_of(filled, "u0"), key_of(filled, "u1")
    assert cache.load(key, ()) and cache.load(other, ())
    cache.forget("", "u0")
    while not cache.settled:
        time.sleep(0.001)
    results = {result.requested: result for result in cache.collect()}
    assert results[key].head is None and results[key].error is None and key not in cache
    assert results[other].head is not None and other in cache
    assert cache.counts.loads == 1
    slot = cache.pin(other)
    assert all(cache.bank.values[at].abs().sum() == 0 for at in range(cache.bank.slots) if at != slot)
    assert load(cache, key)[0].head is not None  # a later request loads it anew
