"""A put adds a version, a rollback goes back to one, and no more are kept than asked for."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from proper.adapters.integrity import check
from proper.adapters.store import AdapterStore, UserRecord
from proper.errors import StoreError

Draw = Callable[[int], dict[str, Tensor]]
both = pytest.mark.parametrize("engine", ["sqlite", "postgresql"], indirect=True)


def put(store: AdapterStore, adapter: Draw, seed: int, user: str = "a") -> None:
    store.put([UserRecord(user, "users", torch.tensor([float(seed)]), adapter(seed), {"seed": seed})])


def current(store: AdapterStore, adapter: Draw, user: str = "a") -> int:
    """Which seed a user's current record was made of."""
    record = store.get(user)
    assert record is not None
    if record.tier == "groups":
        return int(record.embedding[0])
    assert record.adapter is not None
    seed = int(record.metadata["seed"])
    assert record.embedding.tolist() == [seed]
    assert all(torch.equal(record.adapter[name], tensor) for name, tensor in adapter(seed).items())
    return seed


@both
def test_versions_say_where_they_come_from(users: Path, adapter: Draw) -> None:
    store = AdapterStore(users, keep=3)
    store.put([UserRecord("a", "groups", torch.zeros(1))])
    for seed in (1, 2, 3):
        put(store, adapter, seed)
    told = [(each.version, each.parent, each.tier, each.metadata) for each in store.versions("a")]
    assert told == [(4, 3, "users", {"seed": 3}), (3, 2, "users", {"seed": 2}), (2, 1, "users", {"seed": 1})]
    assert store.versions("nobody") == []
    old = store.get("a", version=3)
    assert old is not None and old.metadata == {"seed": 2} and store.get("a", version=1) is None
    store.close()


@both
def test_rolling_back_and_forth(store: AdapterStore, adapter: Draw) -> None:
    put(store, adapter, 1)
    put(store, adapter, 2)
    before = store.head("a")
    assert store.rollback("a") == 3 and current(store, adapter) == 1
    after = store.head("a")
    assert before is not None and after is not None and before.checksum != after.checksum
    assert [each.version for each in store.versions("a")] == [3, 2]
    assert store.rollback("a") == 4 and current(store, adapter) == 2, "twice is where it started"
    put(store, adapter, 3)
    assert current(store, adapter) == 3 and store.rollback("a") == 6 and current(store, adapter) == 2
    assert check(store) == []


@both
def test_rolling_back_from_an_adapter_to_the_group_tier(store: AdapterStore, adapter: Draw) -> None:
    store.put([UserRecord("a", "groups", torch.tensor([5.0]))])
    put(store, adapter, 1)
    store.rollback("a")
    assert list(store.users()) == [("a", "groups")] and current(store, adapter) == 5


@both
def test_nobody_goes_back_to_a_version_for_other_groups(store: AdapterStore, adapter: Draw) -> None:
    put(store, adapter, 1)
    with store.manifest.transaction():
        store.manifest.write("UPDATE records SET written = written - 60")
    record = UserRecord("a", "users", torch.tensor([2.0]), adapter(2), {"seed": 2})
    store.put([record], bound={"groups": "refreshed"})
    for to in (None, 1):
        with pytest.raises(StoreError, match="made since the groups were refreshed"):
            store.rollback("a", to)
    assert current(store, adapter) == 2
    put(store, adapter, 3)
    assert store.rollback("a") == 4 and current(store, adapter) == 2
    assert store.rollback("a") == 5 and current(store, adapter) == 3


@both
def test_a_repair_does_not_go_back_to_a_version_for_other_groups(store: AdapterStore, adapter: Draw) -> None:
    put(store, adapter, 1)
    with store.manifest.transaction():
        store.manifest.write("UPDATE records SET written = written - 60")
    store.put([UserRecord("a", "users", torch.tensor([2.0]), adapter(2))], bound={"groups": "refreshed"})
    with store.manifest.transaction():
        store.manifest.write("UPDATE records SET tier = 'other' WHERE version = 2")
    found, *_ = check(store, repair=True)
    assert found.repair == "went back to the group tier" and list(store.users()) == [("a", "groups")]
    assert current(store, adapter) == 2, "the embedding is that of the damaged version"


def test_there_may_be_nothing_to_go_back_to(tmp_path: Path, adapter: Draw) -> None:
    store = AdapterStore(tmp_path, keep=1)
    with pytest.raises(StoreError, match="user 'a' does not have an earlier version"):
        store.rollback("a")
    put(store, adapter, 1)
    put(store, adapter, 2)
    with pytest.raises(StoreError, match="user 'a' does not have an earlier version"):
        store.rollback("a")
    with pytest.raises(StoreError, match="user 'a' does not have a version 2 to go back to"):
        store.rollback("a", 2)
    assert current(store, adapter) == 2
    store.close()
    with pytest.raises(ValueError, match="keep"):
        AdapterStore(tmp_path, keep=0)


steps = st.lists(st.tuples(st.sampled_from(["put", "rollback", "delete", "group"]), st.integers(0, 1)), max_size=12)


@given(steps=steps, keep=st.integers(1, 3), large=st.booleans())
@settings(max_examples=40)
def test_any_sequence_of_changes_is_that_of_lists(
    tmp_path_factory: pytest.TempPathFactory, adapter: Draw, steps: list[tuple[str, int]], keep: int, large: bool
) -> None:
    folder = tmp_path_factory.mktemp("store")
    store = AdapterStore(folder, keep=keep, file_bytes=0 if large else 1 << 20)
    plain: dict[str, list[int]] = {}
    for at, (step, who) in enumerate(steps):
        user = f"u{who}"
        held = plain.get(user, [])
        if step == "put":
            put(store, adapter, at, user)
            plain[user] = [at, *held][:keep]
        elif step == "group":
            store.put([UserRecord(user, "groups", torch.tensor([float(at)]))])
            plain[user] = [at, *held][:keep]
        elif step == "delete":
            assert store.delete(user) == bool(held)
            plain.pop(user, None)
        elif len(held) > 1:
            store.rollback(user)
            plain[user] = [held[1], *held][: max(keep, 2)]
        assert {user for user, _ in store.users()} == plain.keys()
        for user, held in plain.items():
            assert current(store, adapter, user) == held[0] and len(store.versions(user)) == len(held)
    assert check(store) == []
    store.close()
