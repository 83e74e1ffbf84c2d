"""Real processes on one store in a bucket: writers beside readers and a compaction, kills in the middle of a put."""

from __future__ import annotations

import json
import random
import runpy
import subprocess
import sys
import time
from contextlib import closing
from pathlib import Path

import pytest

from proper.adapters.compaction import compact
from proper.adapters.integrity import check
from proper.adapters.storage_setting import record
from proper.adapters.store import AdapterStore
from tests.s3_server import S3Server

WORKER = Path(__file__).with_name("store_worker.py")
verify = runpy.run_path(str(WORKER))["verify"]
ROUNDS = 10
RUN = "import json, runpy, sys; runpy.run_path(sys.argv[1], {'arguments': json.loads(sys.argv[2])}, 'worker')"


def start(job: str, folder: Path, **more: object) -> subprocess.Popen[bytes]:

    arguments = {"job": job, "folder": str(folder), **more}
    return subprocess.Popen([sys.executable, "-c", RUN, str(WORKER), json.dumps(arguments)])


@pytest.fixture
def run(tmp_path: Path, s3: S3Server) -> tuple[Path, str]:
    folder, bucket = tmp_path / "run", s3.new_bucket(versioned=True)
    folder.mkdir()
    record(folder, f"s3://{bucket}/p")
    return folder, bucket


def only_what_records_need(store: AdapterStore, s3: S3Server, bucket: str) -> bool:
    keys = {name.partition("?")[0] for name in s3.contents(bucket)}
    return keys == {"p/owner", *(f"p/users/{blob}" for blob in store.manifest.referenced())}


@pytest.mark.slow
def test_kills_in_the_middle_of_a_put(run: tuple[Path, str], s3: S3Server) -> None:
    (folder, bucket), draw = run, random.Random(1)
    log, left = folder.parent / "log", 0
    log.touch()
    for kills in range(24):
        if kills >= 8 and left:
            break  # on a busy machine the first eight may all miss the moment
        process, before = start("forever", folder / "users", log=str(log), file_bytes=1 << 20), log.stat().st_size
        while log.stat().st_size == before and process.poll() is None:
            time.sleep(0.01)
        time.sleep(draw.random() * 0.2)
        assert process.poll() is None
        process.kill()
        process.wait()
        committed = int(log.read_text().split()[-1])
        with closing(AdapterStore(folder / "users")) as store:
            numbers = {verify(store.get(f"k{at}")) for at in range(4)}
            assert numbers in ({committed}, {committed + 1}), "all four or none, and nothing committed is lost"
            left += not only_what_records_need(store, s3, bucket)
            assert check(store) == [] and {verify(store.get(f"k{at}")) for at in range(4)} == numbers
            assert only_what_records_need(store, s3, bucket), "what the killed put left is collected"
    assert left > 0, "no kill came between the object and its commit: the test shows nothing"


@pytest.mark.slow
def test_writers_beside_readers_and_a_compaction(run: tuple[Path, str], s3: S3Server) -> None:
    (folder, bucket), stop = run, run[0].parent / "stop"
    AdapterStore(folder / "users").close()
    writers = [start("write", folder / "users", name=name, rounds=ROUNDS) for name in "xy"]
    readers = [start("read", folder / "users", stop=str(stop)) for _ in range(2)]
    try:
        with closing(AdapterStore(folder / "users", shard_bytes=1 << 15)) as store:
            moved = 0
            while any(writer.poll() is None for writer in writers):
                moved += compact(store, below=1.01).shards
                time.sleep(0.2)
            stop.touch()
            assert [process.wait(240) for process in (*writers, *readers)] == [0, 0, 0, 0]
            latest = {user: verify(store.get(user)) for user, _ in store.users()}
            wanted = {f"{name}{number % 5}": number for name in "xy" for number in range(ROUNDS)}
            gone = {f"{name}{number % 5}" for name in "xy" for number in range(ROUNDS - 5, ROUNDS) if number % 7 == 6}
            assert latest == {**{user: at for user, at in wanted.items() if user not in gone}, "shared": ROUNDS - 1}
            assert moved > 0 and check(store) == [] and only_what_records_need(store, s3, bucket)
    finally:
        for process in (*writers, *readers):
            process.kill()
            process.wait()
