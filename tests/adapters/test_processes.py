"""Real processes on one store: writers beside readers and a compaction, kills in the middle of a put, a full disk."""

from __future__ import annotations

import multiprocessing
import random
import runpy
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import pytest

from proper.adapters.compaction import compact
from proper.adapters.integrity import check
from proper.adapters.shards import erase
from proper.adapters.store import AdapterStore

WORKER = Path(__file__).with_name("store_worker.py")
verify = runpy.run_path(str(WORKER))["verify"]
Start = Callable[..., BaseProcess]


@pytest.fixture
def start() -> Iterator[Start]:
    """`start(job, folder, **more)`: a process that does it. The server imports torch once, for all of them."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["proper.adapters.store"])
    started: list[BaseProcess] = []

    def start(job: str, folder: Path, **more: Any) -> BaseProcess:
        arguments = {"job": job, "folder": str(folder), **more}
        process = context.Process(target=runpy.run_path, args=(str(WORKER), {"arguments": arguments}, "worker"))
        process.start()
        started.append(process)
        return process

    yield start
    for process in started:
        process.kill()
        process.join()


def join(process: BaseProcess) -> int | None:
    process.join(240)
    return process.exitcode


def test_two_writers_and_readers_beside_a_compaction(tmp_path: Path, start: Start) -> None:
    stop = tmp_path / "stop"
    writers = [start("write", tmp_path / "users", name=name, rounds=25) for name in "xy"]
    readers = [start("read", tmp_path / "users", stop=str(stop)) for _ in range(2)]
    store, moved = AdapterStore(tmp_path / "users", shard_bytes=1 << 15), 0
    while any(writer.is_alive() for writer in writers):
        moved += compact(store, below=1.01).shards
    assert [join(writer) for writer in writers] == [0, 0]
    moved += compact(store, below=1.01).shards
    stop.touch()
    assert [join(reader) for reader in readers] == [0, 0]
    assert moved > 0
    latest = {user: verify(store.get(user)) for user, _ in store.users()}
    # The last number of each of a writer's users; those whose last round ended in a delete are gone.
    wanted = {f"{name}{number % 5}": number for name in "xy" for number in range(25)}
    gone = {f"{name}{number % 5}" for name in "xy" for number in range(20, 25) if number % 7 == 6}
    assert latest == {**{user: number for user, number in wanted.items() if user not in gone}, "shared": 24}
    assert check(store) == []
    store.close()


def killed_puts(folder: Path, start: Start, kills: int, file_bytes: int, seed: int) -> None:
    draw, log, done = random.Random(seed), folder / "log", 0
    log.touch()
    for _ in range(kills):
        process = start("forever", folder / "users", log=str(log), file_bytes=file_bytes)
        before = log.stat().st_size
        while log.stat().st_size == before and process.is_alive():
            time.sleep(0.002)
        time.sleep(draw.random() * 0.06)
        assert process.is_alive()
        process.kill()
        process.join()

        committed = int(log.read_text().split()[-1])
        store = AdapterStore(folder / "users", file_bytes=file_bytes)
        numbers = {verify(store.get(f"k{at}")) for at in range(4)}
        assert numbers in ({committed}, {committed + 1}), "all four or none, and nothing that was committed is lost"
        found = {each.kind for each in check(store)}
        assert found <= {"orphan-file", "orphan-bytes"}
        done += bool(found)
        check(store, repair=True)
        assert check(store) == [] and {verify(store.get(f"k{at}")) for at in range(4)} == numbers
        store.close()


@pytest.mark.parametrize("file_bytes", [0, 1 << 20], ids=["files", "shards"])
def test_kills_in_the_middle_of_a_put(tmp_path: Path, start: Start, file_bytes: int) -> None:
    killed_puts(tmp_path, start, 4, file_bytes, seed=1)


@pytest.mark.slow
@pytest.mark.parametrize("file_bytes", [0, 1 << 20], ids=["files", "shards"])
def test_many_kills_in_the_middle_of_a_put(tmp_path: Path, start: Start, file_bytes: int) -> None:
    killed_puts(tmp_path, start, 100, file_bytes, seed=2)


@pytest.mark.parametrize("file_bytes", [0, 1 << 20], ids=["files", "shards"])
def test_a_full_disk_loses_no_committed_version(tmp_path: Path, start: Start, file_bytes: int) -> None:
    said = tmp_path / "said"
    assert join(start("full", tmp_path / "users", said=str(said), file_bytes=file_bytes)) == 0
    number, _, message = said.read_text().partition(" ")
    assert "cannot be written" in message and str(tmp_path / "users") in message and "\n" not in message
    store = AdapterStore(tmp_path / "users")
    assert {verify(store.get(f"k{at}")) for at in range(4)} == {int(number)}
    assert check(store) == [], "what was half-written is gone"
    store.close()


def test_an_erasure_that_another_process_ended_takes_no_other_with_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with closing(AdapterStore(tmp_path / "users")) as store:
        one, two = (store.paths.blobs / f"{digit * 32}.safetensors" for digit in "ab")
        two.write_bytes(b"of a deleted user")
        with store.manifest.transaction():
            store.manifest.erase_later(one.name, None, None)

        def meanwhile(_: Path) -> None:
            with store.manifest.transaction():
                store.manifest.write("DELETE FROM erasures")
                store.manifest.erase_later(two.name, None, None)

        with monkeypatch.context() as patched:
            patched.setattr("proper.adapters.shards.sync_folder", meanwhile)
            erase(store.paths.blobs, store.manifest)
        erase(store.paths.blobs, store.manifest)
        assert not two.exists()
