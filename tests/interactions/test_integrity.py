"""Damage to the log is found and named; a repair's quarantine goes with a deletion; no link is followed."""

from __future__ import annotations

import os
import sqlite3
from collections.abc import Callable
from contextlib import closing
from pathlib import Path

import pytest
import torch

from proper.adapters.integrity import check
from proper.adapters.store import AdapterStore, UserRecord
from proper.cli.app import main
from proper.errors import StoreError
from proper.interactions.deletion import links_out_of, remove
from proper.interactions.log import InteractionLog, LogEntry
from proper.interactions.log_check import check_log
from proper.run_folder import UsersFolder

Output = pytest.CaptureFixture[str]


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A run folder with a store and a log of two users."""
    folder = tmp_path / "run"
    with closing(AdapterStore(folder / "users")) as store:
        store.put(UserRecord(user, "users", torch.zeros(2), {"A": torch.ones(3)}) for user in ("ann", "bo"))
    with closing(InteractionLog(folder / "users")) as log:
        for user in ("ann", "bo"):
            log.append("", user, [LogEntry(f"{user} says {number}" * 20, "yes", float(number)) for number in range(50)])
        assert log.queue.take() is not None
    (folder / "config.yaml").write_text("data: {path: x}\n")
    return folder


def test_a_sound_log_has_nothing_to_find(run: Path, tmp_path: Path) -> None:
    assert check_log(run / "users") == [] == check_log(tmp_path)


def _middle(data: bytes) -> bytes:
    at = data.index(b"ann says 20") // 4096 * 4096
    return data[:at] + b"\x05" * 300 + data[at + 300 :]


@pytest.mark.parametrize(
    "damage",
    [lambda data: b"", lambda data: b"\xa5" * 100 + data[100:], _middle, lambda data: data[: len(data) // 2]],
    ids=["empty", "head", "middle", "cut"],
)
def test_a_damaged_file_is_found(run: Path, capsys: Output, damage: Callable[[bytes], bytes]) -> None:
    path = UsersFolder(run / "users").log
    path.write_bytes(damage(path.read_bytes()))
    before = path.read_bytes()
    for options in ([], ["--repair"]):
        assert main(["users", "check", str(run), *options]) == 1
        out, err = capsys.readouterr()
        assert out and all(line.startswith(f"{path}: ") for line in out.splitlines()), out
        assert err.endswith(" left\n") and path.read_bytes() == before


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ("UPDATE interactions SET time = 9e999 WHERE number = 3", "1 interactions that are invalid"),
        ("UPDATE interactions SET prompt = x'00ff' WHERE number < 3", "2 interactions that are invalid"),
        ("DELETE FROM people WHERE user = x'626f'", "50 interactions of users whom the log does not know"),
        ("UPDATE fits SET state = 'flying'", "2 fits that are invalid"),
        ("UPDATE fits SET place = NULL WHERE state = 'queued'", "1 fits that are invalid"),
        ("DELETE FROM sqlite_sequence", "100 interactions beyond the last number that was given"),
    ],
)
def test_a_row_that_makes_no_sense_is_found(run: Path, change: str, said: str) -> None:
    path = UsersFolder(run / "users").log
    with closing(sqlite3.connect(path, isolation_level=None)) as db:
        db.execute(change)
    assert [found.text for found in check_log(run / "users")] == [f"{path}: {said}"]


def test_a_damaged_manifest_does_not_hide_a_damaged_log(run: Path, capsys: Output) -> None:
    for name in ("users.sqlite", "interactions.sqlite"):
        (run / "users" / name).write_bytes(b"")
    users = UsersFolder(run / "users")
    blobs = {path: path.read_bytes() for path in users.blobs.iterdir()}
    assert main(["users", "check", str(run), "--repair"]) == 1
    lines = capsys.readouterr().out.splitlines()
    assert [line.partition(": ")[0] for line in lines] == [str(path) for path in (users.manifest, users.log)]
    assert {path: path.read_bytes() for path in (run / "users" / "blobs").iterdir()} == blobs


def test_a_deletion_takes_what_a_repair_put_aside(run: Path) -> None:
    with closing(AdapterStore(run / "users")) as store, closing(InteractionLog(run / "users")) as log:
        (store.paths.blobs / "9.shard").write_bytes(b"whose?")
        assert [found.kind for found in check(store, repair=True)] == ["orphan-file"]
        assert len(list(UsersFolder(run / "users").quarantine.iterdir())) == 1
        assert remove(store, log, "ann")
        assert not UsersFolder(run / "users").quarantine.exists()


@pytest.mark.parametrize("name", ["report.html", "predictions", "data.sqlite", "users/fits"])
def test_nothing_is_deleted_through_a_link(run: Path, tmp_path: Path, name: str) -> None:
    victim = tmp_path / "victim"
    if "." in name:
        victim.write_text('{"user_id": "ann"}')
    else:
        victim.mkdir()
        (victim / "users.jsonl").write_text('{"user_id": "ann"}\n')
    (run / name).symlink_to(victim)
    with closing(AdapterStore(run / "users")) as store, closing(InteractionLog(run / "users")) as log:
        with pytest.raises(StoreError, match=f"{name}: is a symbolic link out of the run folder"):
            remove(store, log, "ann")
        assert store.head("ann") is not None and log.count("", "ann") == 50, "all or nothing"
        os.unlink(run / name)
        assert remove(store, log, "ann")
    assert "ann" in (victim if victim.is_file() else victim / "users.jsonl").read_text()


def test_bytes_are_not_wiped_through_a_link(run: Path, tmp_path: Path) -> None:
    shard, victim = run / "users" / "blobs" / "1.shard", tmp_path / "victim"
    shard.rename(victim)
    before = victim.read_bytes()
    shard.symlink_to(victim)
    with closing(AdapterStore(run / "users")) as store, pytest.raises(StoreError, match=r"1\.shard: cannot be erased"):
        store.delete("ann")
    assert victim.read_bytes() == before


def test_a_folder_of_blobs_that_is_a_link_is_refused(run: Path, tmp_path: Path) -> None:
    blobs = run / "users" / "blobs"
    blobs.rename(tmp_path / "elsewhere")
    blobs.symlink_to(tmp_path / "elsewhere")
    with pytest.raises(StoreError, match="blobs: is a symbolic link"):
        AdapterStore(run / "users")


def test_links_that_lead_out_of_a_folder_are_found(tmp_path: Path) -> None:
    home = tmp_path / "home"
    (home / "in").mkdir(parents=True)
    (home / "loop").symlink_to("..")
    (home / "in" / "self").symlink_to(home)
    (home / "in" / "out").symlink_to(tmp_path / "gone")
    assert links_out_of(home) == [home / "in" / "out", home / "loop"]
