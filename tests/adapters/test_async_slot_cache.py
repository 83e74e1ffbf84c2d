"""Slots filled on another thread: who is in them, who makes room, what becomes of damaged and changed adapters."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from proper.adapters.async_slot_cache import AdapterKey, AsyncSlotCache, LoadResult
from proper.adapters.store import AdapterStore, UserRecord
from proper.layers.bank import AdapterBank, Layout


@pytest.fixture
def residents(filled: AdapterStore, layout: Layout) -> Iterator[AsyncSlotCache]:
    made = AsyncSlotCache(lambda tenant: filled, AdapterBank(layout, 2, alpha=4.0, trainable=False))
    yield made
    made.close()


def key_of(store: AdapterStore, user: str) -> AdapterKey:
    key = AdapterKey.of("", user, store.head(user))
    assert key is not None
    return key


def collected(residents: AsyncSlotCache) -> list[LoadResult]:
    found: list[LoadResult] = []
    while residents.loading:
        found += residents.collect()
        time.sleep(0.001)
    return found


def load(residents: AsyncSlotCache, *keys: AdapterKey) -> list[LoadResult]:
    for key in keys:
        assert residents.load(key, keys)
    return collected(residents)


def row_of(store: AdapterStore, residents: AsyncSlotCache, user: str) -> Tensor:
    record = store.get(user)
    assert record is not None and record.adapter is not None
    row = torch.empty(residents.bank.layout.width)
    residents.bank.layout.pack(record.adapter, row)
    return row


def test_loaded_pinned_evicted(filled: AdapterStore, residents: AsyncSlotCache) -> None:
    keys = [key_of(filled, f"u{at}") for at in range(5)]
    assert [outcome.error for outcome in load(residents, *keys[:2])] == [None, None]
    slot = residents.pin(keys[0])
    assert torch.equal(residents.bank.values[slot], row_of(filled, residents, "u0"))
    assert not residents.load(keys[2], {keys[1]}), "one is pinned, the other kept"
    assert residents.load(keys[2], ()) and keys[1] not in residents
    collected(residents)
    assert keys[0] in residents and keys[2] in residents
    residents.unpin(keys[0])
    assert residents.load(keys[3], ()) and keys[0] not in residents, "used longest ago"
    collected(residents)
    assert (residents.counts.loads, residents.counts.evictions) == (4, 2)


def test_versions_of_one_user_side_by_side(filled: AdapterStore, residents: AsyncSlotCache) -> None:
    old = key_of(filled, "u0")
    load(residents, old)
    before = residents.bank.values[residents.pin(old)].clone()
    other = filled.get("u1")
    assert other is not None
    filled.put([replace(other, user="u0")])
    new = key_of(filled, "u0")
    load(residents, new)
    assert torch.equal(residents.bank.values[residents.pin(new)], row_of(filled, residents, "u1"))
    assert torch.equal(residents.bank.values[residents.pin(old)], before)


def test_what_a_load_finds_may_be_newer_or_gone(filled: AdapterStore, residents: AsyncSlotCache) -> None:
    asked, gone = key_of(filled, "u0"), key_of(filled, "u3")
    other = filled.get("u1")
    assert other is not None
    filled.put([replace(other, user="u0")])
    filled.delete("u3")
    newer, nothing = sorted(load(residents, asked, gone), key=lambda outcome: outcome.asked.user)
    assert newer.head is not None and newer.head.version == 2 and asked not in residents
    assert key_of(filled, "u0") in residents
    assert nothing.head is None and nothing.error is None and len(residents) == 1


def test_a_damaged_adapter_leaves_a_free_clean_slot(
    filled: AdapterStore, residents: AsyncSlotCache, adapter: Callable[[int], dict[str, Tensor]]
) -> None:
    for blob in filled.blobs.iterdir():
        blob.write_bytes(bytes(blob.stat().st_size))
    (outcome,) = load(residents, key_of(filled, "u0"))
    assert outcome.error is not None and "damaged" in outcome.error
    assert residents.counts.damaged == 1 and len(residents) == 0
    assert residents.bank.values.abs().sum() == 0
    filled.put([UserRecord("u0", "users", torch.zeros(3), adapter(0))])
    assert load(residents, key_of(filled, "u0"))[0].error is None


def test_forgetting_waits_for_the_last_pin(filled: AdapterStore, residents: AsyncSlotCache) -> None:
    key = key_of(filled, "u0")
    load(residents, key)
    slot = residents.pin(key)
    residents.forget("", "u0")
    residents.forget("another", "u0")
    assert residents.bank.values[slot].abs().sum() > 0
    residents.unpin(key)
    assert residents.bank.values[slot].abs().sum() == 0 and key not in residents


def test_who_is_forgotten_on_the_way_does_not_arrive(filled: AdapterStore, residents: AsyncSlotCache) -> None:
    key, other = key_of(filled, "u0"), key_of(filled, "u1")
    assert residents.load(key, ()) and residents.load(other, ())
    residents.forget("", "u0")
    while not residents.settled:
        time.sleep(0.001)
    outcomes = {outcome.asked: outcome for outcome in residents.collect()}
    assert outcomes[key].head is None and outcomes[key].error is None and key not in residents
    assert outcomes[other].head is not None and other in residents
    assert residents.counts.loads == 1
    slot = residents.pin(other)
    assert all(residents.bank.values[at].abs().sum() == 0 for at in range(residents.bank.slots) if at != slot)
    assert load(residents, key)[0].head is not None  # who comes back is loaded anew
