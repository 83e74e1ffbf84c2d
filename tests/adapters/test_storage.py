"""One contract for adapters in a folder and in a bucket: puts, versions, rollback, deletion, kills, many processes."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path

import pytest
import torch
from torch import Tensor

from proper.adapters.compaction import compact
from proper.adapters.integrity import check
from proper.adapters.records import commit, prepare
from proper.adapters.storage_setting import record
from proper.adapters.store import AdapterStore, UserRecord
from proper.errors import StoreError
from tests.s3_server import S3Server

Draw = Callable[[int], dict[str, Tensor]]
Open = Callable[..., AdapterStore]


class Place:
    """A run folder whose adapters are in a folder or in a bucket, and all bytes that are stored in it."""

    def __init__(self, run: Path, server: S3Server | None, versioned: bool) -> None:
        self.run, self.server, self._opened = run, server, list[AdapterStore]()
        if server is not None:
            self.bucket = server.new_bucket(versioned)
            run.mkdir(exist_ok=True)
            record(run, f"s3://{self.bucket}/people")

    def open(self, **options: int) -> AdapterStore:
        self._opened.append(AdapterStore(self.run / "users", **options))
        return self._opened[-1]

    def close(self) -> None:
        for store in self._opened:
            store.close()

    def stored(self) -> dict[str, bytes]:
        """Every file of the run folder, and every version of every object."""
        files = {str(path): path.read_bytes() for path in self.run.rglob("*") if path.is_file()}
        return files if self.server is None else files | self.server.contents(self.bucket)

    def places_of(self, secret: bytes) -> list[str]:
        return [name for name, data in self.stored().items() if secret in data]


@pytest.fixture(params=["folder", "bucket"])
def place(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Place]:
    server = None if request.param == "folder" else request.getfixturevalue("s3")
    opened = Place(tmp_path / "run", server, request.param == "versioned bucket")
    yield opened
    opened.close()


def people(adapter: Draw, seeds: range, first: int = 0) -> list[UserRecord]:
    return [UserRecord(f"u{at}", "users", torch.ones(2), adapter(first + at), {"seed": first + at}) for at in seeds]


def bytes_of(adapter: dict[str, Tensor]) -> bytes:
    return b"".join(tensor.numpy().tobytes() for tensor in adapter.values())


def seeds_of(store: AdapterStore, adapter: Draw) -> dict[str, int]:
    """Every user's seed, after comparing every tensor with what the seed draws."""
    found = {}
    for user, _ in store.users():
        record = store.get(user)
        assert record is not None and record.adapter is not None
        wanted = adapter(int(record.metadata["seed"]))
        assert all(torch.equal(record.adapter[name], wanted[name]) for name in wanted), user
        found[user] = int(record.metadata["seed"])
    return found


def test_puts_versions_and_rollback(place: Place, adapter: Draw) -> None:
    store = place.open()
    store.put(people(adapter, range(6)))
    store.put(people(adapter, range(2), first=10))
    assert seeds_of(store, adapter) == {"u0": 10, "u1": 11, "u2": 2, "u3": 3, "u4": 4, "u5": 5}
    older = store.get("u0", 1)
    assert older is not None and older.metadata == {"seed": 0}
    store.rollback("u1")
    assert seeds_of(store, adapter)["u1"] == 1
    again = place.open()
    assert seeds_of(again, adapter) == seeds_of(store, adapter) and check(again) == []


def test_a_failed_put_changes_nothing_and_leaves_nothing(place: Place, adapter: Draw) -> None:
    store = place.open(shard_bytes=700)
    store.put(people(adapter, range(3)))

    def records() -> Iterator[UserRecord]:
        yield from people(adapter, range(3), first=20)
        raise StoreError("the source broke")

    with pytest.raises(StoreError, match="the source broke"):
        store.put(records())
    assert seeds_of(store, adapter) == {"u0": 0, "u1": 1, "u2": 2} and check(store) == []
    assert place.places_of(bytes_of(adapter(20))) == []


@pytest.mark.parametrize("place", ["folder", "bucket", "versioned bucket"], indirect=True)
@pytest.mark.parametrize("file_bytes", [0, 1 << 20], ids=["alone", "together"])
def test_a_deleted_user_is_nowhere_and_nobody_else_is_lost(place: Place, adapter: Draw, file_bytes: int) -> None:
    store = place.open(file_bytes=file_bytes)
    store.put(people(adapter, range(4)))
    store.put(people(adapter, range(1), first=30))
    store.put(people(adapter, range(1), first=40))  # the first version goes
    assert seeds_of(store, adapter)["u0"] == 40
    gone = [bytes_of(adapter(seed)) for seed in (0, 30, 40)]
    assert len(place.places_of(gone[2])) >= (1 if place.server is None else 2), "in the cache too"
    assert store.delete("u0") and store.wipe(1.0)
    assert [where for secret in gone for where in place.places_of(secret)] == []
    assert seeds_of(store, adapter) == {"u1": 1, "u2": 2, "u3": 3} and check(store) == []
    assert len(place.places_of(bytes_of(adapter(1)))) >= 1


def test_a_kill_between_bytes_and_commit_leaves_no_damage(place: Place, adapter: Draw) -> None:
    store = place.open()
    store.put(people(adapter, range(2)))
    killed = place.open()
    prepare(people(adapter, range(1), first=50)[0], killed.writer, 1 << 20)
    killed.writer.sync()
    killed.close()  # its bytes are stored, and no row says so
    assert len(place.places_of(bytes_of(adapter(50)))) == 1
    assert seeds_of(store, adapter) == {"u0": 0, "u1": 1}
    if place.server is None:
        assert [each.kind for each in check(store)] == ["orphan-bytes"]
        check(store, repair=True)
        assert check(store) == []
    else:
        store.delete("nobody")  # every deletion collects what killed puts left
        assert place.places_of(bytes_of(adapter(50))) == [] and check(store) == []


def test_a_commit_after_its_bytes_were_collected_fails(s3: S3Server, tmp_path: Path, adapter: Draw) -> None:
    place = Place(tmp_path / "run", s3, versioned=False)
    slow, other = place.open(), place.open()
    new = prepare(people(adapter, range(1))[0], slow.writer, 1 << 20)
    slow.writer.sync()
    other.delete("nobody")
    with pytest.raises(StoreError, match="removed while it was written"), slow.manifest.transaction():
        commit(slow.manifest, "", [new], slow.writer.sizes(), 2)
    slow.writer.undo()
    assert slow.head("u0") is None and check(slow) == []
    place.close()


def test_a_reader_with_an_old_row_looks_again(place: Place, adapter: Draw) -> None:
    store, rows = place.open(), []
    store.put(people(adapter, range(8)))

    def read(row: object) -> object:
        rows.append(row)
        if len(rows) == 1:
            store.delete_many(f"u{at}" for at in range(1, 8))
            compact(store)
        return store.record("u0", row)  # type: ignore[arg-type]

    found = store.read("u0", read)
    assert isinstance(found, UserRecord) and found.metadata == {"seed": 0}


def test_compaction_loses_nobody(place: Place, adapter: Draw) -> None:
    store = place.open(shard_bytes=700)
    for at in range(6):
        store.put(people(adapter, range(at, at + 1)))
    store.put(people(adapter, range(1), first=60))
    store.delete("u3")
    compact(store, below=1.01)
    assert seeds_of(store, adapter) == {"u0": 60, "u1": 1, "u2": 2, "u4": 4, "u5": 5} and check(store) == []
    store.rollback("u0")
    assert seeds_of(store, adapter)["u0"] == 0


def test_a_lost_manifest_is_not_made_anew(place: Place, adapter: Draw) -> None:
    with closing(AdapterStore(place.run / "users")) as store:
        store.put(people(adapter, range(2)))
    for path in (place.run / "users").glob("users.sqlite*"):
        path.unlink()
    with pytest.raises(StoreError, match="is missing, but .* holds adapters"):
        place.open()
