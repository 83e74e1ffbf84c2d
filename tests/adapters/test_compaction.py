"""Holes are given back, and nobody loses an adapter over it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from proper.adapters.compaction import compact
from proper.adapters.integrity import check
from proper.adapters.store import AdapterStore, UserRecord
from proper.errors import StoreError

Draw = Callable[[int], dict[str, Tensor]]
ADAPTER = 4 * 80  # bytes of one of the conftest's


def people(adapter: Draw, count: int) -> list[UserRecord]:
    return [UserRecord(f"u{at:02}", "users", torch.zeros(1), adapter(at), {"seed": at}) for at in range(count)]


def intact(store: AdapterStore, adapter: Draw) -> int:
    found = 0
    for user, _ in store.users():
        record = store.get(user)
        assert record is not None and record.adapter is not None
        wanted = adapter(int(record.metadata["seed"]))
        assert all(torch.equal(record.adapter[name], wanted[name]) for name in wanted), user
        found += 1
    return found


def on_disk(store: AdapterStore) -> int:
    return sum(path.stat().st_size for path in store.paths.blobs.iterdir())


@pytest.fixture
def many(users: Path, adapter: Draw, request: pytest.FixtureRequest) -> AdapterStore:
    """40 users in shards of 8."""
    store = AdapterStore(users, shard_bytes=8 * ADAPTER)
    request.addfinalizer(store.close)
    store.put(people(adapter, 40))
    assert on_disk(store) == 40 * ADAPTER and len(list(store.paths.blobs.iterdir())) == 5
    return store


@pytest.mark.parametrize("engine", ["sqlite", "postgresql"], indirect=True)
def test_holes_are_given_back(many: AdapterStore, adapter: Draw) -> None:
    assert many.delete_many(f"u{at:02}" for at in range(0, 24, 2)) == 12
    assert on_disk(many) == 40 * ADAPTER, "wiped, not yet given back"
    done = compact(many)
    assert (done.shards, done.bytes_before, done.bytes_after) == (3, 40 * ADAPTER, 28 * ADAPTER)
    assert on_disk(many) == 28 * ADAPTER and intact(many, adapter) == 28 and check(many) == []
    assert compact(many).shards == 0
    many.put(people(adapter, 40))
    assert intact(many, adapter) == 40 and check(many) == []


def test_an_empty_shard_goes(many: AdapterStore, adapter: Draw) -> None:
    many.delete_many(f"u{at:02}" for at in range(40))
    assert compact(many).bytes_after == 0 and list(many.paths.blobs.iterdir()) == []
    many.put(people(adapter, 3))
    assert intact(many, adapter) == 3 and check(many) == []


@pytest.mark.parametrize("engine", ["sqlite", "postgresql"], indirect=True)
def test_all_versions_move_together(many: AdapterStore, adapter: Draw) -> None:
    many.put([UserRecord("u00", "users", torch.zeros(1), adapter(70), {"seed": 70})])
    many.rollback("u00")
    compact(many, below=1.01)
    assert intact(many, adapter) == 40 and check(many) == []
    many.rollback("u00")
    record = many.get("u00")
    assert (
        record is not None
        and record.metadata["seed"] == 70
        and record.metadata["made"]["by"] == "rollback"
        and intact(many, adapter) == 40
    )


def test_a_shard_that_another_writer_has_open_is_left_alone(many: AdapterStore, adapter: Draw) -> None:
    many.delete_many(f"u{at:02}" for at in range(0, 40, 2))
    other = AdapterStore(many.folder, shard_bytes=100 * ADAPTER)
    many.writer.close()
    other.put(people(adapter, 1))
    assert compact(many).shards == 4
    other.put([UserRecord("z", "users", torch.zeros(1), adapter(99), {"seed": 99})])
    assert intact(many, adapter) == 22 and check(many) == []
    other.close()


def test_a_reader_with_an_old_row_looks_again(many: AdapterStore, adapter: Draw) -> None:
    rows = []

    def read(row: object) -> object:
        rows.append(row)
        if len(rows) == 1:
            many.delete_many(f"u{at:02}" for at in range(1, 8))
            assert compact(many).shards == 1
        return many.record("u00", row)  # type: ignore[arg-type]

    record = many.read("u00", read)
    assert isinstance(record, UserRecord) and record.metadata == {"seed": 0} and len(rows) == 2


def test_a_user_deleted_while_bytes_are_copied_leaves_no_copy(
    many: AdapterStore, adapter: Draw, monkeypatch: pytest.MonkeyPatch
) -> None:
    many.delete_many(f"u{at:02}" for at in range(4))
    other = AdapterStore(many.folder)
    sync = many.writer.sync

    def late() -> None:
        sync()
        other.delete("u05")

    monkeypatch.setattr(many.writer, "sync", late)
    assert compact(many).shards == 1
    secret = b"".join(tensor.numpy().tobytes() for tensor in adapter(5).values())
    assert not any(secret in path.read_bytes() for path in many.paths.blobs.iterdir())
    assert intact(many, adapter) == 35 and check(many) == []
    other.close()


def test_a_failed_compaction_changes_nothing(
    many: AdapterStore, adapter: Draw, monkeypatch: pytest.MonkeyPatch
) -> None:
    many.delete_many(f"u{at:02}" for at in range(0, 40, 2))
    before = on_disk(many)

    def full() -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(many.writer, "sync", full)
    with pytest.raises(StoreError, match="cannot be compacted: No space left"):
        compact(many)
    assert on_disk(many) == before and intact(many, adapter) == 20 and check(many) == []


def test_a_cut_off_shard_is_left_for_check(many: AdapterStore, adapter: Draw) -> None:
    many.delete_many(f"u{at:02}" for at in range(4))
    path = many.paths.blobs / "1.shard"
    path.write_bytes(path.read_bytes()[:-10])
    assert compact(many).shards == 0 and path.exists()
    assert [each.kind for each in check(many)] == ["torn"]
