"""Everything that can be wrong is found, named and put right, and what is right is left alone."""

from __future__ import annotations

import os
import sqlite3
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path

import pytest
import torch
from torch import Tensor

from proper.adapters import store
from proper.adapters.integrity import Finding, check
from proper.adapters.store import AdapterStore, UserRecord
from proper.errors import StoreError
from proper.files import read_json
from proper.run_folder import UsersFolder

Draw = Callable[[int], dict[str, Tensor]]


def kinds(findings: list[Finding]) -> list[tuple[str, str | None, int | None]]:
    return [(found.kind, found.user, found.version) for found in findings]


def sizes(store: AdapterStore) -> dict[str, int]:
    return {path.name: path.stat().st_size for path in store.paths.blobs.iterdir()}


def blob_of(store: AdapterStore, user: str) -> tuple[Path, int, int]:
    row = store.manifest.head("", user.encode())
    assert row is not None and row.place is not None
    return store.paths.blobs / row.place.blob, row.place.offset, row.place.length


@pytest.fixture(params=[0, 1 << 20], ids=["files", "shards"])
def two(tmp_path: Path, adapter: Draw, request: pytest.FixtureRequest) -> AdapterStore:
    """Users a, b and c with two versions each."""
    store = AdapterStore(tmp_path / "users", file_bytes=request.param)
    for seed in (0, 10):
        store.put(UserRecord(name, "users", torch.ones(2), adapter(seed + at)) for at, name in enumerate("abc"))
    request.addfinalizer(store.close)
    return store


def test_a_sound_store_has_nothing_to_find(two: AdapterStore) -> None:
    two.delete("b")
    before = sizes(two)
    assert check(two) == [] and check(two, repair=True) == [] and sizes(two) == before


def test_bytes_that_cannot_be_read_now_are_not_damaged(two: AdapterStore, monkeypatch: pytest.MonkeyPatch) -> None:
    def pieces(*_: object) -> Iterator[bytes]:
        raise PermissionError(13, "no permission")

    before = {user: two.versions(user) for user in "abc"}
    with monkeypatch.context() as closed:
        closed.setattr(type(two.shards), "pieces", pieces)
        with pytest.raises(StoreError, match=r"blobs/.*: cannot be read: no permission; nothing is repaired"):
            check(two, repair=True)
    assert {user: two.versions(user) for user in "abc"} == before and check(two) == []


def test_a_file_that_is_replaced_during_a_check_is_no_error(two: AdapterStore) -> None:
    found = two.shards.blobs()
    first, _ = next(found)
    for path in two.paths.blobs.iterdir():
        if path.name != first:
            path.unlink()
    assert list(found) == []


def test_a_failed_put_leaves_nothing_to_the_next_one(
    two: AdapterStore, adapter: Draw, monkeypatch: pytest.MonkeyPatch
) -> None:
    def away(*_: object) -> int:
        raise StoreError("the manifest is away")

    with monkeypatch.context() as broken:
        broken.setattr(store, "commit", away)
        for name in ("shard_size", "refers_to"):
            broken.setattr(type(two.manifest), name, away)
        with pytest.raises(StoreError, match="is away"):
            two.put([UserRecord("d", "users", torch.ones(2), adapter(30))])
    two.put([UserRecord("e", "users", torch.ones(2), adapter(31))])
    assert two.shards.remove_unowned(1) and check(two) == []


@pytest.mark.parametrize("kind", ["flipped", "torn", "missing"])
def test_a_damaged_current_version(two: AdapterStore, adapter: Draw, kind: str) -> None:
    path, offset, length = blob_of(two, "c")  # the last one written
    if kind == "flipped":
        with path.open("r+b") as file:
            file.seek(offset + length // 2)
            byte = file.read(1)
            file.seek(-1, os.SEEK_CUR)
            file.write(bytes([byte[0] ^ 8]))
    elif kind == "torn":
        os.truncate(path, offset + length - 3)
    else:
        path.unlink()
    lost = "abc" if kind == "missing" and path.suffix == ".shard" else "c"
    both = kind == "missing" and path.suffix == ".shard"
    found = check(two)
    assert kinds(found) == [(kind, user, version) for user in lost for version in ((2, 1) if both else (2,))]
    assert "c" in found[-1].text and not found[-1].repair
    assert kinds(check(two)) == kinds(found), "looking changes nothing"

    fixed = check(two, repair=True)

    if both:
        assert {each.repair for each in fixed} == {"went back to the group tier"}
        assert list(two.users()) == [("a", "groups"), ("b", "groups"), ("c", "groups")]
        record = two.get("c")
        assert record is not None and record.embedding.tolist() == [1, 1] and "damaged" in record.metadata["reason"]
    else:
        assert fixed[0].repair == "went back to version 1"
        record = two.get("c")
        assert record is not None and record.adapter is not None
        assert torch.equal(record.adapter["h.*.up.A"], adapter(2)["h.*.up.A"])
        assert [each.version for each in two.versions("c")] == [3, 1]
        other = two.get("a")
        assert other is not None and other.adapter is not None
    assert check(two) == []
    two.put([UserRecord("d", "users", torch.zeros(1), adapter(50))])
    assert check(two) == [] and two.get("d") is not None


def test_a_damaged_old_version_is_only_dropped(two: AdapterStore) -> None:
    row = two.manifest.versions("", b"a")[1]
    assert row.place is not None
    with (two.paths.blobs / row.place.blob).open("r+b") as file:
        file.seek(row.place.offset)
        file.write(b"\xff" * 4)
    found, orphan = check(two, repair=True)
    assert orphan.kind.startswith("orphan") and orphan.repair, "its bytes"
    assert (found.kind, found.user, found.version) == ("flipped", "a", 1)
    assert found.repair == "removed this version; a newer one is current"
    assert [each.version for each in two.versions("a")] == [2] and check(two) == []
    (aside,) = UsersFolder(two.folder).quarantine.glob("*-row.json")
    assert read_json(aside)["version"] == 1 and bytes.fromhex(read_json(aside)["user"]) == b"a"


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ("tier = 'kings'", "no such tier: 'kings'"),
        ("blob = '../../secret'", "no such byte range: '../../secret'"),
        ("offset = -4", "no such byte range"),
        ("layout = 99", "layout 99 is missing"),
        ("length = length - 8", "where its layout has"),
        ("facts = '{'", "its metadata is not JSON"),
        ("facts = '[]'", "its metadata is not a mapping"),
        ("embedding = x'0102'", "its embedding is cut off"),
        ("blob = NULL", "no adapter, on the tier 'users'"),
        ("xxh3 = x'00'", "its checksum (xxh3) differs"),
    ],
)
def test_a_row_that_makes_no_sense(two: AdapterStore, change: str, said: str) -> None:
    with two.manifest.transaction():
        two.manifest.write(f"UPDATE records SET {change} WHERE user = ? AND version = 2", (b"b",))
    (two.folder.parent / "secret").write_text("not of the store")
    found = [each for each in check(two) if not each.kind.startswith("orphan")]
    assert len(found) == 1 and said in found[0].text and found[0].text.startswith("user 'b', version 2: ")
    check(two, repair=True)
    assert check(two) == [] and (two.folder.parent / "secret").exists()
    assert [each.version for each in two.versions("b")] == [3, 1]
    assert all(two.get(user) is not None for user in "abc")


def test_orphans(two: AdapterStore) -> None:
    (two.paths.blobs / ".x.tmp").write_bytes(b"half")
    (two.paths.blobs / f"{'0' * 32}.safetensors").write_bytes(b"never committed")
    (two.paths.blobs / "77.shard").write_bytes(b"of no manifest")
    assert {each.kind for each in check(two)} == {"orphan-file"} and len(check(two)) == 3
    fixed = check(two, repair=True)
    assert all(each.repair.startswith(f"moved to {UsersFolder(two.folder).quarantine}/00000") for each in fixed)
    assert check(two) == []
    kept = {path.read_bytes() for path in UsersFolder(two.folder).quarantine.iterdir()}
    assert kept == {b"half", b"never committed", b"of no manifest"}
    (two.paths.blobs / "77.shard").write_bytes(b"another of that name")
    check(two, repair=True)
    assert len(list(UsersFolder(two.folder).quarantine.iterdir())) == 4


def test_orphan_bytes_in_and_behind_a_shard(filled: AdapterStore) -> None:
    filled.delete("u2")
    filled.writer.close()
    (path,) = filled.paths.blobs.iterdir()
    whole = path.read_bytes()
    hole = len(whole) // 5 * 2
    with path.open("r+b") as file:
        file.seek(hole)
        file.write(b"remains of somebody")
        file.seek(0, os.SEEK_END)
        file.write(b"torn tail")
    (found,) = check(filled)
    assert found.kind == "orphan-bytes" and str(path) in found.text
    (found,) = check(filled, repair=True)
    assert found.repair == f"moved to {UsersFolder(filled.folder).quarantine}"
    assert path.read_bytes() == whole and check(filled) == []
    in_hole, behind = sorted(UsersFolder(filled.folder).quarantine.iterdir())
    assert in_hole.read_bytes().startswith(b"remains of somebody") and behind.read_bytes() == b"torn tail"


def test_nothing_at_all_is_left_of_a_user(store: AdapterStore, adapter: Draw) -> None:
    store.put([UserRecord("a", "users", torch.zeros(2), adapter(1))])
    with store.manifest.transaction():
        store.manifest.write("UPDATE records SET embedding = x'01'")
    (found, *_) = check(store, repair=True)
    assert found.repair == "removed the user: nothing of them was left"
    assert list(store.users()) == [] and check(store) == []


def test_a_damaged_manifest_is_said(tmp_path: Path, adapter: Draw) -> None:
    store = AdapterStore(tmp_path)
    store.put(UserRecord(f"u{at}", "groups", torch.zeros(64)) for at in range(200))
    store.close()
    path = tmp_path / "users.sqlite"
    with sqlite3.connect(path) as db:
        (size,) = db.execute("PRAGMA page_size").fetchone()
        (root,) = db.execute("SELECT rootpage FROM sqlite_master WHERE name = 'records'").fetchone()
    db.close()
    data = bytearray(path.read_bytes())
    data[(root - 1) * size : (root - 1) * size + 64] = b"\x05" * 64
    path.write_bytes(data)
    store = AdapterStore(tmp_path)
    found = check(store, repair=True)
    assert found and {each.kind for each in found} == {"manifest"} and not any(each.repair for each in found)
    store.close()


@pytest.mark.parametrize("lost", ["empty", "missing", "without tables"])
def test_adapters_are_left_alone_where_the_manifest_is_lost(two: AdapterStore, lost: str) -> None:
    two.close()
    before, path = sizes(two), two.folder / "users.sqlite"
    path.unlink()
    if lost != "missing":
        path.touch()
    if lost == "without tables":
        with closing(sqlite3.connect(path)) as db:
            db.execute("VACUUM")
    with pytest.raises(StoreError, match=r"users\.sqlite: .*; restore a backup"):
        AdapterStore(two.folder)
    assert sizes(two) == before


def test_a_link_is_moved_and_not_followed(two: AdapterStore, tmp_path: Path) -> None:
    victim = tmp_path / "precious"
    victim.write_bytes(b"precious")
    (two.paths.blobs / "77.shard").symlink_to(victim)
    check(two, repair=True)
    assert victim.read_bytes() == b"precious" and not (two.paths.blobs / "77.shard").is_symlink()
    assert [path.is_symlink() for path in UsersFolder(two.folder).quarantine.iterdir()] == [True]


def test_an_erasure_that_a_kill_cut_short_is_finished(two: AdapterStore) -> None:
    path, offset, length = blob_of(two, "a")
    with two.manifest.transaction():
        two.manifest.drop_user("", b"a")
    assert path.exists() and any(path.read_bytes()[offset : offset + length]), "the kill came here"
    again = AdapterStore(two.folder)
    assert not path.exists() or not any(path.read_bytes()[offset : offset + length])
    assert check(again) == []
    again.close()


def spoil_last(store: AdapterStore, user: str, seed: int, draw: Draw, number: float, part: str) -> None:
    """Put a version whose checksums are right and whose numbers are not."""
    tensors, embedding = draw(seed), torch.ones(2)
    (embedding if part == "embedding" else next(iter(tensors.values())).view(-1))[0] = number
    with pytest.MonkeyPatch.context() as patch:  # as an earlier version of the program, which did not look, put it
        patch.setattr("proper.adapters.records.require_sound", lambda *_: None)
        store.put([UserRecord(user, "users", embedding, tensors)])


@pytest.mark.parametrize("number", [float("nan"), float("inf"), 1e30])
@pytest.mark.parametrize("part", ["adapter", "embedding"])
def test_numbers_that_take_no_part_in_an_answer(two: AdapterStore, adapter: Draw, part: str, number: float) -> None:
    spoil_last(two, "b", 50, adapter, number, part)
    (found,) = check(two)
    assert (found.kind, found.user, found.version) == ("unsound", "b", 3)
    assert "numbers" in found.text and ("embedding" in found.text) == (part == "embedding")
    fixed, *_ = check(two, repair=True)  # then its bytes, which nobody owns any more
    assert (fixed.kind, fixed.repair) == ("unsound", "went back to version 2") and check(two) == []
    record = two.get("b")
    assert record is not None and record.embedding.tolist() == [1, 1]


def test_an_unsound_embedding_is_not_what_a_user_goes_back_to(store: AdapterStore, adapter: Draw) -> None:
    spoil_last(store, "a", 1, adapter, float("nan"), "embedding")
    found, *_ = check(store, repair=True)
    assert (found.kind, found.repair) == ("unsound", "removed the user: nothing of them was left")
    assert list(store.users()) == []
