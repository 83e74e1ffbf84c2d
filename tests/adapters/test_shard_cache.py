"""The cache in front of object storage: bounded, least recently used first out, wrong bytes never served."""

from __future__ import annotations

import os
from collections import OrderedDict
from pathlib import Path

from hypothesis import given
from hypothesis import strategies as st

from proper.adapters.manifest import ByteRange
from proper.adapters.shard_cache import ShardCache


def place(number: int, length: int = 10) -> ByteRange:
    return ByteRange("1.shard", number * 100, length)


def content(number: int, length: int = 10) -> bytes:
    return bytes([number]) * length


def add(cache: ShardCache, number: int, length: int = 10) -> None:
    cache.add(place(number, length), content(number, length), lambda: True)


def read(cache: ShardCache, number: int, length: int = 10) -> bytes | None:
    target = bytearray(length)
    return bytes(target) if cache.read(place(number, length), memoryview(target)) else None


def held(cache: ShardCache) -> int:
    return sum(path.stat().st_size for path in cache.folder.iterdir() if path.name != "size")


def set_clock(cache: ShardCache, number: int, now: int) -> None:
    """Files are ordered by the time of use; two uses within one tick of the file system's clock are equal to it."""
    os.utime(cache.folder / f"1.shard@{number * 100}", ns=(now, now))


@given(st.lists(st.tuples(st.booleans(), st.integers(0, 7), st.integers(1, 40)), max_size=30))
def test_it_holds_what_a_plain_lru_holds_and_never_more_than_its_limit(steps: list[tuple[bool, int, int]]) -> None:
    import tempfile

    limit = 100
    with tempfile.TemporaryDirectory() as folder:
        cache, oracle, sizes, total = ShardCache(Path(folder) / "cache", limit), OrderedDict[int, int](), {}, 0
        for now, (reads, number, length) in enumerate(steps):
            length = sizes.setdefault(number, length)
            if reads:
                assert (read(cache, number, length) == content(number, length)) is (number in oracle)
            if not reads and number not in oracle:
                add(cache, number, length)
                if total + length > limit:
                    while total > int(limit * 0.9) - length:
                        total -= oracle.popitem(last=False)[1]
                total += length
                oracle[number] = length
            if number in oracle:
                oracle.move_to_end(number)
                set_clock(cache, number, now)
            assert cache.folder.exists() is bool(oracle) or total == 0
            if oracle:
                assert held(cache) == total <= limit


def test_bytes_of_a_user_who_was_deleted_meanwhile_are_not_kept(tmp_path: Path) -> None:
    cache = ShardCache(tmp_path / "cache", 1000)
    cache.add(place(1), content(1), lambda: False)
    assert read(cache, 1) is None and held(cache) == 0


def test_removed_files_are_zeroed_and_what_a_kill_left_goes_too(tmp_path: Path) -> None:
    cache = ShardCache(tmp_path / "cache", 1000)
    add(cache, 1)
    add(cache, 2)
    (cache.folder / "new").write_bytes(content(1))
    with (cache.folder / "1.shard@100").open("rb") as opened:
        cache.remove([place(1)])
        assert opened.read() == bytes(10), "zeroed before it was removed"
    assert read(cache, 1) is None and read(cache, 2) == content(2)
    assert {path.name for path in cache.folder.iterdir()} == {"1.shard@200", "size"}
    assert int.from_bytes((cache.folder / "size").read_bytes(), "little") == 10


def test_moved_ranges_stay_and_files_of_blobs_that_are_gone_go(tmp_path: Path) -> None:
    cache = ShardCache(tmp_path / "cache", 1000)
    for number in (1, 2, 3):
        add(cache, number)
    cache.move({place(1): place(7)})
    assert read(cache, 1) is None and read(cache, 7) == content(1)
    cache.add(ByteRange("2.shard", 0, 4), b"four", lambda: True)
    assert cache.retain(lambda: {"2.shard"}) == 30 and held(cache) == 4


def test_what_does_not_fit_or_cannot_be_written_is_no_error(tmp_path: Path) -> None:
    small = ShardCache(tmp_path / "cache", 5)
    add(small, 1)
    assert not small.folder.exists()
    (tmp_path / "file").touch()
    add(ShardCache(tmp_path / "file" / "cache", 100), 1)
