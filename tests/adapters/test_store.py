"""One record per user: whole or not at all, whatever the user is called."""

from __future__ import annotations

import random
import sqlite3
import threading
import time
from collections.abc import Callable, Iterable, Mapping
from contextlib import closing
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from proper.adapters.store import AdapterStore, UserRecord
from proper.errors import StoreError

Draw = Callable[[int], dict[str, Tensor]]
both = pytest.mark.parametrize("engine", ["sqlite", "postgresql"], indirect=True)


def blobs(store: AdapterStore) -> list[Path]:
    return sorted((store.folder / "blobs").iterdir())


def raw(adapter: Mapping[str, Tensor]) -> bytes:
    return b"".join(tensor.numpy().tobytes() for tensor in adapter.values())


def found_in(store: AdapterStore, data: bytes) -> bool:
    """Is this anywhere in the store's files, the database and its log included?"""
    return any(data in path.read_bytes() for path in store.folder.rglob("*") if path.is_file())


def same(one: UserRecord | None, other: UserRecord) -> bool:
    assert one is not None
    tensors = (one.adapter is None) == (other.adapter is None)
    if one.adapter is not None and other.adapter is not None:
        tensors = one.adapter.keys() == other.adapter.keys() and all(
            torch.equal(one.adapter[name], other.adapter[name]) for name in one.adapter
        )
    metadata = (one.user, one.tier, one.metadata) == (other.user, other.tier, other.metadata)
    return metadata and torch.equal(one.embedding, other.embedding) and tensors


@both
def test_round_trip_through_a_new_process_of_the_same_folder(store: AdapterStore, adapter: Draw) -> None:
    records = [
        UserRecord("a", "users", torch.randn(128), adapter(1), {"passes": 3, "reason": "größer 🎈"}),
        UserRecord("b", "groups", torch.tensor([1e-30, -0.0, 1e4])),
        UserRecord("c", "users", torch.randn(2), {n: t.bfloat16() for n, t in adapter(2).items()}),
    ]
    store.put(records)
    store.close()
    again = AdapterStore(store.folder)
    for record in records:
        assert same(again.get(record.user), record)
    found = again.get("c")
    assert found is not None and found.adapter is not None
    assert {tensor.dtype for tensor in found.adapter.values()} == {torch.bfloat16}
    assert list(again.users()) == [("a", "users"), ("b", "groups"), ("c", "users")]
    assert again.get("nobody") is None
    again.close()


@pytest.mark.parametrize("file_bytes", [0, 1 << 20], ids=["files", "shards"])
def test_replacing_a_user_leaves_nothing_of_the_old_one(tmp_path: Path, adapter: Draw, file_bytes: int) -> None:
    store = AdapterStore(tmp_path, keep=1, file_bytes=file_bytes)
    store.put([UserRecord("a", "users", torch.zeros(3), adapter(1), {"old": True})])
    old = raw(adapter(1))
    assert found_in(store, old)

    new = UserRecord("a", "users", torch.ones(3), adapter(2), {"new": True})
    store.put([new])

    assert same(store.get("a"), new)
    assert not found_in(store, old) and found_in(store, raw(adapter(2)))
    store.put([UserRecord("a", "groups", torch.ones(3))])
    assert not found_in(store, raw(adapter(2))) and list(store.users()) == [("a", "groups")]
    store.close()


@pytest.mark.parametrize("file_bytes", [0, 1 << 20], ids=["files", "shards"])
def test_deleting_leaves_no_byte_of_the_user(tmp_path: Path, adapter: Draw, file_bytes: int) -> None:
    store = AdapterStore(tmp_path, file_bytes=file_bytes)
    embedding = torch.tensor([1.2345, 6.789, 3.14159])
    for seed in (1, 2, 3):
        secret = {"text": "tell nobody"}
        store.put([UserRecord("someone in particular", "users", embedding, adapter(seed), secret)])
    store.put([UserRecord("other", "users", torch.zeros(3), adapter(4)), UserRecord("g", "groups", torch.zeros(3))])
    personal = [raw(adapter(2)), raw(adapter(3)), b"someone in particular", b"tell nobody", raw({"e": embedding})]
    assert all(found_in(store, data) for data in personal)

    assert store.delete("someone in particular")

    assert not any(found_in(store, data) for data in personal)
    assert store.get("someone in particular") is None and store.versions("someone in particular") == []
    assert not store.delete("someone in particular") and not store.delete("nobody")
    assert same(store.get("other"), UserRecord("other", "users", torch.zeros(3), adapter(4)))
    assert store.delete_many(["g", "nobody", "other"]) == 2 and list(store.users()) == []
    store.close()


@both
def test_a_user_who_comes_back_starts_anew(filled: AdapterStore, adapter: Draw) -> None:
    filled.delete("u1")
    new = UserRecord("u1", "users", torch.zeros(3), adapter(9))
    filled.put([new])
    assert same(filled.get("u1"), new)
    assert [(each.version, each.parent) for each in filled.versions("u1")] == [(1, None)]


ODD = [
    "",
    ".",
    "..",
    "../../etc/passwd",
    "/root",
    "a/b\\c",
    "🎈" * 50,
    "x" * 1000,
    "a\0b",
    "a\nb",
    "'; DROP TABLE users; --",
    "\ud83d",
    "e\u0301",
    "\u00e9",
]


@pytest.mark.parametrize("file_bytes", [0, 1 << 20], ids=["files", "shards"])
def test_odd_user_ids_are_ids_and_never_paths(tmp_path: Path, adapter: Draw, file_bytes: int) -> None:
    store = AdapterStore(tmp_path / "users", file_bytes=file_bytes)
    records = [UserRecord(user, "users", torch.full((2,), float(at)), adapter(at)) for at, user in enumerate(ODD)]
    store.put(records)
    for record in records:
        assert same(store.get(record.user), record), ascii(record.user[:20])
    assert sorted(user for user, _ in store.users()) == sorted(ODD)
    assert len(blobs(store)) == (1 if file_bytes else len(ODD))
    inside = {path for path in store.folder.rglob("*") if path.is_file()}
    assert {path.parent.name for path in inside} == {"users", "blobs"}
    assert [path for path in store.folder.parent.iterdir()] == [store.folder]
    for user in ODD:
        assert store.delete(user)
    assert sum(len(path.read_bytes().strip(b"\0")) for path in blobs(store)) == 0 and list(store.users()) == []
    store.close()


@given(users=st.lists(st.text(max_size=20), unique=True, max_size=5))
@settings(max_examples=15, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_texts_stay_apart(tmp_path: Path, adapter: Draw, users: list[str]) -> None:
    store = AdapterStore(tmp_path / "any")
    store.put(UserRecord(user, "groups", torch.tensor([float(at)])) for at, user in enumerate(users))
    for at, user in enumerate(users):
        record = store.get(user)
        assert record is not None and record.embedding.tolist() == [at]
        store.delete(user)
    store.close()


def test_tenants_do_not_see_each_other(tmp_path: Path, adapter: Draw) -> None:
    one, other = AdapterStore(tmp_path, "one"), AdapterStore(tmp_path, "other")
    one.put([UserRecord("a", "users", torch.zeros(1), adapter(1))])
    other.put([UserRecord("a", "users", torch.ones(1), adapter(2))])
    for store, seed in ((one, 1), (other, 2)):
        found = store.get("a")
        assert found is not None and found.adapter is not None
        assert torch.equal(found.adapter["h.*.up.A"], adapter(seed)["h.*.up.A"])
    other.put([UserRecord("b", "groups", torch.ones(1))])
    assert one.get("b") is None and list(one.users()) == [("a", "users")]
    assert other.delete("a") and one.get("a") is not None
    one.close()
    other.close()


@pytest.mark.parametrize("damage", ["missing", "empty", "cut", "garbage", "one bit"])
@pytest.mark.parametrize("file_bytes", [0, 1 << 20], ids=["files", "shards"])
def test_a_damaged_adapter_names_user_and_file(tmp_path: Path, adapter: Draw, damage: str, file_bytes: int) -> None:
    store = AdapterStore(tmp_path, file_bytes=file_bytes)
    store.put([UserRecord("u1", "users", torch.zeros(3), adapter(1))])
    others = blobs(store) if not file_bytes else []
    store.put([UserRecord("u2", "users", torch.zeros(3), adapter(2))])
    (path,) = set(blobs(store)) - set(others)
    whole = path.read_bytes()
    if damage == "missing":
        path.unlink()
    else:
        flipped = whole[:-5] + bytes([whole[-5] ^ 1]) + whole[-4:]
        garbage = whole[: len(whole) // 2] + b"\xff" * (len(whole) // 2)
        path.write_bytes({"empty": b"", "cut": whole[:-20], "garbage": garbage, "one bit": flipped}[damage])
    with pytest.raises(StoreError, match="of user 'u2' is missing or damaged") as error:
        store.get("u2")
    assert str(path) in str(error.value)
    if not file_bytes or damage not in ("missing", "empty"):
        assert store.get("u1") is not None, "the others are fine"
    store.close()


@both
def test_a_store_belongs_to_one_backbone(store: AdapterStore) -> None:
    store.bind({"backbone": "abc", "rank": "4"})
    store.bind({"backbone": "abc"})
    store.bind({"rank": "4", "groups": "g"})
    with pytest.raises(StoreError, match=r"belong to another rank \(4, not 8\)"):
        store.bind({"backbone": "abc", "rank": "8"})
    with pytest.raises(StoreError, match=r"belong to another backbone \(abc, not xyz\)") as error:
        store.bind({"backbone": "xyz"})
    assert str(store.folder) in str(error.value)
    again = AdapterStore(store.folder)
    with pytest.raises(StoreError, match="another groups"):
        again.bind({"groups": "h"})
    again.close()


@both
def test_a_batch_of_records_is_stored_whole_or_not_at_all(store: AdapterStore, adapter: Draw) -> None:
    old = UserRecord("a", "users", torch.zeros(2), adapter(1))
    store.put([old])

    def broken() -> Iterable[UserRecord]:
        yield UserRecord("a", "users", torch.ones(2), adapter(2))
        yield UserRecord("b", "groups", torch.ones(2))
        raise KeyError("b")

    with pytest.raises(KeyError):
        store.put(broken())
    assert same(store.get("a"), old) and store.get("b") is None
    with pytest.raises(TypeError):
        store.put(
            [UserRecord("a", "groups", torch.ones(2)), UserRecord("c", "groups", torch.ones(2), None, {"x": {1}})]
        )
    assert same(store.get("a"), old) and store.get("c") is None


@both
def test_metadata_comes_without_reading_adapters(filled: AdapterStore, adapter: Draw) -> None:
    filled.put([UserRecord("z", "users", torch.zeros(3), adapter(0), {"passes": 2})])
    for path in blobs(filled):
        path.unlink()
    told = {user: (tier, metadata, size) for user, tier, metadata, size in filled.metadata()}
    assert told["g"] == ("groups", {}, 12)
    assert told["z"] == ("users", {"passes": 2}, len(raw(adapter(0))) + 12)
    assert list(told) == ["g", "u0", "u1", "u2", "u3", "u4", "z"]


def test_a_manifest_that_is_no_database(tmp_path: Path) -> None:
    (tmp_path / "users.sqlite").write_bytes(b"not a database at all, but long enough to look like one" * 20)
    with pytest.raises(StoreError, match=r"users\.sqlite"):
        AdapterStore(tmp_path)


def test_a_store_of_the_first_format_is_refused(tmp_path: Path) -> None:
    db = sqlite3.connect(tmp_path / "users.sqlite")
    db.execute("CREATE TABLE users (tenant TEXT)")
    db.close()
    with pytest.raises(StoreError, match=r"users\.sqlite: store of another version of proper \(format 1\)"):
        AdapterStore(tmp_path)


def test_a_store_locked_by_another_process_says_so(filled: AdapterStore) -> None:
    other = sqlite3.connect(filled.folder / "users.sqlite", isolation_level=None)
    other.execute("BEGIN IMMEDIATE")
    store = AdapterStore(filled.folder, wait_seconds=0.01)
    for change in (
        lambda: store.put([UserRecord("a", "groups", torch.zeros(1))]),
        lambda: store.delete("u1"),
        lambda: store.bind({"rank": "1"}),
    ):
        with pytest.raises(StoreError, match=r"users\.sqlite: the store cannot be written: database is locked"):
            change()
    assert store.get("a") is None and store.get("u1") is not None
    other.execute("ROLLBACK")
    other.close()
    store.put([UserRecord("a", "groups", torch.zeros(1))])
    assert store.get("a") is not None
    store.close()


def test_a_writer_that_waits_for_another_process_holds_up_no_thread(filled: AdapterStore) -> None:
    other = sqlite3.connect(filled.folder / "users.sqlite", isolation_level=None)
    other.execute("BEGIN IMMEDIATE")
    writer = threading.Thread(target=lambda: filled.put([UserRecord("a", "groups", torch.zeros(1))]))
    writer.start()
    time.sleep(0.2)  # it waits for the lock now
    begun = time.monotonic()
    assert filled.head("u1") is not None and filled.get("u3") is not None and filled.head("a") is None
    assert time.monotonic() - begun < 1
    other.execute("ROLLBACK")
    writer.join()
    other.close()
    assert filled.head("a") is not None


@both
def test_reading_from_another_thread(filled: AdapterStore) -> None:
    found: list[UserRecord | None] = []
    thread = threading.Thread(target=lambda: found.append(filled.get("u3")))
    thread.start()
    thread.join()
    assert found[0] is not None and found[0].embedding.tolist() == [3, 3, 3]


def test_a_row_that_moved_between_pages_leaves_nothing_after_its_deletion(tmp_path: Path) -> None:
    left = 0
    for seed in range(4):
        draw, folder = random.Random(seed), tmp_path / str(seed)
        names = [f"user-{draw.randrange(10**9):09d}" for _ in range(60)]
        with closing(AdapterStore(folder)) as store:
            for name in [*names, *draw.choices(names, k=120)]:
                store.put([UserRecord(name, "groups", torch.ones(draw.randrange(1, 200)), None)])
            for name in names[:30]:
                store.delete(name)
                left += name.encode() in store.manifest.path.read_bytes()
                assert store.wipe(1.0, name) and name.encode() not in store.manifest.path.read_bytes()
            assert sorted(user for user, _ in store.users()) == sorted(names[30:])
    assert left > 0, "SQLite overwrote every place from which it moved a row: the test shows nothing"
