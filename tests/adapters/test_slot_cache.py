"""Users' adapters are in the bank when their batch runs; the least recently used make room."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from proper.adapters.quantization import encode
from proper.adapters.slot_cache import SlotCache
from proper.adapters.store import AdapterStore, UserRecord
from proper.errors import StoreError
from proper.layers.bank import AdapterBank, Layout

MEAN = torch.tensor([-1.0, -2.0, -3.0])


def cache_of(store: AdapterStore, layout: Layout, slots: int) -> SlotCache:
    return SlotCache(store, AdapterBank(layout, slots, alpha=4.0, trainable=False), MEAN)


def row_of(cache: SlotCache, user: str) -> Tensor:
    """What a user's slot should hold."""
    record = cache.store.get(user)
    assert record is not None and record.adapter is not None and cache.bank is not None
    row = torch.empty(cache.bank.layout.width)
    cache.bank.layout.pack(record.adapter, row)
    return row


def test_unknown_users_get_the_mean_and_no_slot(filled: AdapterStore, layout: Layout) -> None:
    cache = cache_of(filled, layout, 2)
    users = ["u1", None, "stranger", "g"]
    assert cache.embeddings(users).tolist() == [[1.0] * 3, MEAN.tolist(), MEAN.tolist(), [9.0] * 3]
    assert [cache.tier(user) for user in users] == ["users", "none", "none", "groups"]
    slots = cache.slots(users)
    assert slots is not None and slots.tolist() == [0, -1, -1, -1]
    assert cache.slots([None, "g", "stranger"]) is None
    assert SlotCache(filled, None, MEAN).slots(["u1"]) is None


def test_the_least_recently_used_makes_room(filled: AdapterStore, layout: Layout) -> None:
    cache = cache_of(filled, layout, 2)

    def slots(*users: str) -> list[int]:
        found = cache.slots(users)
        assert found is not None
        return found.tolist()

    assert slots("u0", "u1", "u0") == [0, 1, 0]
    assert slots("u0") == [0]
    assert slots("u2") == [1], "u1 was used longest ago"
    assert slots("u3", "u2") == [0, 1], "u2 stays: it is in the batch"
    assert slots("u1", "u0") in ([0, 1], [1, 0])


@given(batches=st.lists(st.lists(st.integers(0, 4), min_size=1, max_size=6), max_size=8))
@settings(max_examples=30, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_every_row_finds_its_own_users_adapter(filled: AdapterStore, layout: Layout, batches: list[list[int]]) -> None:
    cache = cache_of(filled, layout, 3)
    assert cache.bank is not None
    for batch in batches:
        users = [f"u{number}" for number in batch]
        if len(set(users)) > 3:
            with pytest.raises(StoreError, match=f"{len(set(users))} users in one batch, and the bank has 3 slots"):
                cache.slots(users)
            continue
        slots = cache.slots(users)
        assert slots is not None
        for user, slot in zip(users, slots.tolist(), strict=True):
            assert torch.equal(cache.bank.values[slot], row_of(cache, user))


def test_an_adapter_of_another_shape_is_named(filled: AdapterStore, layout: Layout) -> None:
    cache = cache_of(filled, layout, 2)
    filled.put([UserRecord("odd", "users", torch.zeros(3), {"h.*.up.A": torch.zeros(2)})])
    with pytest.raises(StoreError, match="the adapter of user 'odd' does not fit"):
        cache.slots(["odd"])
    cache.slots(["u0"])
    with pytest.raises(StoreError, match="'odd'"):
        cache.slots(["u0", "odd"])
    slots = cache.slots(["u0", "u1"])
    assert slots is not None and cache.bank is not None
    for user, slot in zip(["u0", "u1"], slots.tolist(), strict=True):
        assert torch.equal(cache.bank.values[slot], row_of(cache, user)), "the failed load left nothing behind"


def test_bf16_adapters_are_widened(
    store: AdapterStore, layout: Layout, adapter: Callable[[int], dict[str, Tensor]]
) -> None:
    low = {name: tensor.bfloat16() for name, tensor in adapter(3).items()}
    store.put([UserRecord("a", "users", torch.zeros(3), low)])
    cache = cache_of(store, layout, 1)
    assert cache.bank is not None and cache.slots(["a"]) is not None
    assert cache.bank.values.dtype == torch.float32
    assert torch.equal(cache.bank.down["h.1.up"][0], low["h.*.up.A"][1].float())


def test_int8_adapters_are_decoded(
    store: AdapterStore, layout: Layout, adapter: Callable[[int], dict[str, Tensor]]
) -> None:
    store.put([UserRecord("a", "users", torch.zeros(3), encode(adapter(3), "int8"))])
    cache = cache_of(store, layout, 1)
    assert cache.bank is not None and cache.slots(["a"]) is not None
    assert torch.equal(cache.bank.values[0], row_of(cache, "a"))
    error = cache.bank.down["h.1.up"][0] - adapter(3)["h.*.up.A"][1]
    assert 0 < error.norm() < 0.01 * adapter(3)["h.*.up.A"][1].norm()


def test_a_change_of_the_store_is_noticed(
    filled: AdapterStore, layout: Layout, adapter: Callable[[int], dict[str, Tensor]]
) -> None:
    cache = cache_of(filled, layout, 2)
    assert cache.bank is not None and cache.slots(["u1"]) is not None

    def serves(seed: int) -> bool:
        slots = cache.slots(["u1"])
        assert slots is not None and cache.bank is not None
        return torch.equal(cache.bank.down["h.0.up"][int(slots)], adapter(seed)["h.*.up.A"][0])

    assert serves(1)
    filled.put([UserRecord("u1", "users", torch.zeros(3), adapter(20))])
    assert serves(20)
    filled.rollback("u1")
    assert serves(1)
    filled.delete("u1")
    assert cache.slots(["u1"]) is None and cache.tier("u1") == "none"
    filled.put([UserRecord("u1", "users", torch.zeros(3), adapter(21))])
    assert serves(21), "version 1 again, and another adapter"


def test_a_damaged_adapter_frees_its_slot(filled: AdapterStore, layout: Layout) -> None:
    cache = cache_of(filled, layout, 1)
    cache.slots(["u0"])
    (path,) = filled.blobs.iterdir()
    path.write_bytes(b"\xff" * path.stat().st_size)
    with pytest.raises(StoreError, match="'u1' is missing or damaged"):
        cache.slots(["u1"])
    assert cache.bank is not None and not cache.bank.values.any()
    assert cache.slots(["g"]) is None
