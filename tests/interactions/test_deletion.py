"""Deletions that cannot end at once, or were killed: they go on later, and nothing brings a deleted user back."""

from __future__ import annotations

import os
import re
import signal
import sqlite3
import subprocess
import sys
from collections.abc import Iterator
from contextlib import closing
from importlib import resources
from pathlib import Path
from typing import Any

import pytest
import torch

from proper.adapters.store import AdapterStore, UserRecord
from proper.errors import InputError, StoreError
from proper.files import sweep, write_text
from proper.interactions import deletion
from proper.interactions.deletion import delete_returned, finish_deletions, remove, working
from proper.interactions.log import DeletedError, InteractionLog, LogEntry
from proper.interactions.personal_files import work_folder
from proper.run_folder import UNFINISHED, RunFolder, Tier

SECRET = "zyzzyva-text"


@pytest.fixture
def users(tmp_path: Path) -> Path:
    """A run's store and log with the user `ann`."""
    folder = tmp_path / "run" / "users"
    with closing(AdapterStore(folder)) as store, closing(InteractionLog(folder)) as log:
        store.put([UserRecord("ann", "groups", torch.ones(4), None, {"said": SECRET})])
        log.append("", "ann", [LogEntry(SECRET, "x")])
    (folder.parent / "config.yaml").write_text("{}")
    return folder


@pytest.fixture
def store(users: Path) -> Iterator[AdapterStore]:
    with closing(AdapterStore(users)) as opened:
        yield opened


@pytest.fixture
def log(users: Path) -> Iterator[InteractionLog]:
    with closing(InteractionLog(users)) as opened:
        yield opened


def left(users: Path) -> list[str]:
    files = [path for path in users.parent.rglob("*") if path.is_file()]
    return [path.name for path in files if any(mark in path.read_bytes() for mark in (SECRET.encode(), b"ann"))]


def test_a_deletion_closes_a_run_that_others_could_open(users: Path, store: AdapterStore, log: InteractionLog) -> None:
    users.parent.chmod(0o755)
    assert not remove(store, log, "ann", 0).waits
    assert users.parent.stat().st_mode & 0o777 == 0o700


def test_a_reader_makes_a_deletion_wait_and_it_goes_on(users: Path, store: AdapterStore, log: InteractionLog) -> None:
    with closing(sqlite3.connect(users / "interactions.sqlite", isolation_level=None)) as reader:
        reader.execute("BEGIN")
        reader.execute("SELECT count(*) FROM interactions").fetchone()
        removal = remove(store, log, "ann", 0)
        assert removal.found and removal.waits and left(users)
        assert log.deletions.state("", removal.job) == "running"
        with pytest.raises(DeletedError, match="is being deleted"):
            log.append("", "ann", [], new=True)
        assert finish_deletions(users)
    assert not finish_deletions(users)
    assert (log.deletions.state("", removal.job), left(users)) == ("done", [])
    assert log.deletions.state("other", removal.job) is None


CLOSES = """
import sys
from contextlib import closing
from pathlib import Path
from proper.adapters.store import AdapterStore
from proper.interactions.log import InteractionLog, LogEntry
folder = Path(sys.argv[1])
with closing(AdapterStore(folder)) as store, closing(InteractionLog(folder)) as log:
    log.append("", "ben", [LogEntry("hello", "x")], new=True)
    store.head("ann")
"""


def test_a_deletion_keeps_the_locks_of_this_process(users: Path, store: AdapterStore, log: InteractionLog) -> None:
    """Another process that closes the files must not take itself for the last and delete the logs under us."""
    assert not remove(store, log, "ann", 0).waits
    log.append("", "cleo", [LogEntry("one", "x")], new=True)
    store.put([UserRecord("cleo", "groups", torch.ones(4))])
    logs = [users / f"{name}-{kind}" for name in ("users.sqlite", "interactions.sqlite") for kind in ("wal", "shm")]
    before = [each.stat().st_ino for each in logs]
    subprocess.run([sys.executable, "-c", CLOSES, str(users)], check=True)
    assert [each.stat().st_ino for each in logs if each.exists()] == before
    log.append("", "cleo", [LogEntry("two", "x")])
    with closing(InteractionLog(users)) as another:
        assert another.count("", "cleo") == 2 and another.knows("", "ben") and not another.knows("", "ann")


def test_a_command_that_writes_makes_a_deletion_wait_and_ends_it(
    users: Path, store: AdapterStore, log: InteractionLog
) -> None:
    with working(users.parent):
        write_text(users.parent / "users.json", '{"users": [{"user": "ann"}]}')
        assert remove(store, log, "ann", 0).waits
        write_text(users.parent / "predictions" / "users.jsonl", '{"user": "ann"}\n')
    assert not log.deletions.pending() and not left(users)


def test_a_kill_at_any_point_is_made_good(users: Path) -> None:
    code = (
        "import os, signal, sys, pathlib; from proper.interactions import deletion as r\n"
        "from proper.adapters.store import AdapterStore as S; from proper.interactions.log import InteractionLog as L\n"
        "users, name = pathlib.Path(sys.argv[1]), sys.argv[2]\n"
        "owner = r if hasattr(r, name) else S if hasattr(S, name) else None\n"
        "setattr(owner, name, lambda *a, **k: os.kill(os.getpid(), signal.SIGKILL))\n"
        "r.remove(S(users), L(users), 'ann')\n"
    )
    for name in ("_resume", "_remove_files", "delete", "remove_work", "wipe"):
        with closing(InteractionLog(users)) as log, closing(AdapterStore(users)) as store:
            log.append("", "ann", [LogEntry(SECRET, "x")], new=not log.knows("", "ann"))
            store.put([UserRecord("ann", "groups", torch.ones(4), None, {"said": SECRET})])
        write_text(users.parent / "users.json", '{"users": [{"user": "ann"}]}')
        done = subprocess.run([sys.executable, "-c", code, str(users), name], check=False)
        assert done.returncode == -signal.SIGKILL
        assert left(users)
        assert not finish_deletions(users)
        assert not left(users), name


def test_nothing_but_an_enrolment_brings_a_user_back(users: Path, store: AdapterStore, log: InteractionLog) -> None:
    assert not remove(store, log, "ann").waits
    store.put(
        [UserRecord("ann", "users", torch.ones(4), {"a": torch.ones(9)}, {}), UserRecord("bo", "groups", torch.ones(4))]
    )
    assert [user for user, _ in store.users()] == ["bo"]
    assert not any(any(blob.read_bytes()) for blob in store.paths.blobs.iterdir())
    with pytest.raises(DeletedError, match="was deleted"):
        log.append("", "ann", [LogEntry(SECRET, "x")])
    with pytest.raises(DeletedError):
        log.request_fit("", "ann")
    assert not left(users), "a tombstone names no user"
    log.append("", "ann", [LogEntry(SECRET, "x")], new=True)
    store.put([UserRecord("ann", "groups", torch.ones(4))])
    assert store.head("ann") is not None and log.count("", "ann") == 1


def test_a_deletion_that_another_process_ended_spares_the_user_enrolled_since(
    users: Path, store: AdapterStore, log: InteractionLog, monkeypatch: pytest.MonkeyPatch
) -> None:
    log.append("", "bob", [LogEntry("p", "t")])
    for user in ("ann", "bob"):
        log.deletions.begin("", user)
    second, whole = str(log.deletions.pending()[1].user), deletion._resume

    def busy_with_the_first(*given: Any) -> list[str]:
        monkeypatch.undo()
        assert not remove(store, log, second, 0).waits
        log.append("", second, [LogEntry("again", "t")], new=True)
        return whole(*given)

    monkeypatch.setattr(deletion, "_resume", busy_with_the_first)
    assert not finish_deletions(users)
    assert log.count("", second) == 1 and not log.tombstones.has("", second)
    assert not log.deletions.pending()


KILLED_PUT = """
import os, sys, torch
from pathlib import Path
from proper.adapters import store
from proper.adapters.store import AdapterStore, UserRecord
opened = AdapterStore(Path(sys.argv[1]), file_bytes=int(sys.argv[2]))
store.commit = lambda *_: os.kill(os.getpid(), 9)
opened.put([UserRecord("ann", "users", torch.ones(4), {"x.A": torch.full((64, 4), 3.25)})])
"""


@pytest.mark.parametrize("file_bytes", [0, 1 << 20], ids=["files", "shards"])
def test_what_a_killed_put_left_goes_with_the_next_deletion(
    users: Path, store: AdapterStore, log: InteractionLog, file_bytes: int
) -> None:
    mark = torch.full((64,), 3.25).numpy().tobytes()
    kept = {"x.A": torch.full((64, 4), 7.5)}
    with closing(AdapterStore(users, file_bytes=file_bytes)) as other:
        other.put([UserRecord("bob", "users", torch.ones(4), kept)])
    ended = subprocess.run([sys.executable, "-c", KILLED_PUT, users, str(file_bytes)], timeout=60)
    blobs = users / "blobs"
    assert ended.returncode == -signal.SIGKILL and any(mark in path.read_bytes() for path in blobs.iterdir())
    assert not remove(store, log, "ann").waits
    assert not any(mark in path.read_bytes() for path in blobs.iterdir())
    bob = store.get("bob")
    assert bob is not None and bob.adapter is not None and bob.adapter["x.A"].equal(kept["x.A"])


def test_what_fits_and_killed_writers_left_goes_with_the_user(
    users: Path, store: AdapterStore, log: InteractionLog
) -> None:
    theirs, others = work_folder(users, "", "ann"), work_folder(users, "", "bo")
    for folder in (theirs, others):
        folder.mkdir(parents=True)
    (theirs / "state").write_text(SECRET)
    (users.parent / ".users.json.x1y2.tmp").write_text(SECRET)
    assert not remove(store, log, "ann").waits
    assert not theirs.exists() and others.exists() and not left(users)


def test_only_files_of_the_registry_are_written_into_a_run(users: Path) -> None:
    for name in ("notes.txt", "exports/ann.json", "users/copy.json", "seeds/1/notes.txt"):
        with pytest.raises(InputError, match="lies in the run folder"):
            write_text(users.parent / name, "ann")
    write_text(users.parent / "seeds" / "1" / "users.json", "{}")


def test_what_a_killed_writer_left_is_swept_and_a_living_ones_is_not(tmp_path: Path) -> None:
    code = (
        "import os, pathlib, sys; from proper.files import atomic_path\n"
        "with atomic_path(pathlib.Path(sys.argv[1])) as temporary:\n"
        "    temporary.write_text('half'); print('written', flush=True); sys.stdin.read()\n"
    )
    command = [sys.executable, "-c", code, str(tmp_path / "a.txt")]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as writer:
        assert writer.stdout is not None and writer.stdout.readline()
        sweep(tmp_path)
        assert os.listdir(tmp_path), "its writer lives"
        writer.kill()
        writer.wait()
    (tmp_path / ".b.txt.x1y2.tmp").write_text("of an earlier version")
    sweep(tmp_path)
    assert not os.listdir(tmp_path)


def test_no_other_module_writes_files_by_itself() -> None:
    """Whatever does not go through `files` writes under a fixed, listed name, or not into a run folder at all."""
    root = Path(str(resources.files("proper")))
    opens = re.compile(
        r"sqlite3\.connect\((?!\")|\.open\(\"[wax]|\.open\(.*\"(wb|ab)\"|\.write_(bytes|text)\(|save_(file|pretrained)\(|os\.open\("
        r"|open_private\(|mkstemp|mkdtemp"
    )
    found = {
        path.relative_to(root).as_posix()
        for path in root.rglob("*.py")
        if path.parent.name != "benchmarks" and any(opens.search(line) for line in path.read_text().splitlines())
    }
    assert found == {
        # names that the registry lists
        "adapters/integrity.py",
        "adapters/folder_shards.py",
        "adapters/objects.py",  # an object into quarantine
        "adapters/shard_cache.py",
        "adapters/shards.py",
        "adapters/tombstones.py",
        "data/database.py",
        "data/public/download.py",
        "files.py",
        "interactions/personal_files.py",
        "models/checkpoints.py",
        "databases/sqlite.py",
        "sqlite_files.py",
        "training/metrics_log.py",
        "training/preflight.py",  # a temporary folder elsewhere
        # folders of their own
        "export/export_all.py",
        "export/run_export.py",
        "export/user_archive.py",
        "models/gguf.py",
        "training/population.py",
    }


@pytest.mark.parametrize("left_by_a_kill", UNFINISHED)
def test_what_a_kill_left_of_a_trained_stage_does_not_keep_users_from_being_deleted(
    users: Path, store: AdapterStore, log: InteractionLog, left_by_a_kill: str
) -> None:
    run = RunFolder(users.parent)
    path = run.path / left_by_a_kill
    run.users.work.mkdir()
    run.users.refresh.touch()
    if path != run.users.work:
        path.parent.mkdir(exist_ok=True)
        path.write_text(SECRET)
    run.marker(left_by_a_kill.partition("/")[0]).touch()
    with pytest.raises(InputError, match="a stage is being trained"):  # a refresh of the groups
        remove(store, log, "ann", 0)
    run.users.refresh.unlink()
    assert not remove(store, log, "ann", 0).waits
    assert not path.exists() and not left(users)


@pytest.mark.parametrize("content", [None, "", "no key"])
def test_deleted_users_are_not_forgotten_without_a_word_when_the_key_is_damaged(
    users: Path, store: AdapterStore, log: InteractionLog, content: str | None
) -> None:
    remove(store, log, "ann", 0)
    key = users.parent / "tombstones" / "key"
    key.unlink() if content is None else key.write_text(content)
    with pytest.raises(StoreError, match="tombstones/key: is lost or damaged"):
        store.put([UserRecord("ann", Tier.GROUPS, torch.ones(4))])
    assert store.head("ann") is None


def test_damaged_data_is_an_error_that_names_the_file(users: Path, store: AdapterStore, log: InteractionLog) -> None:
    assert not remove(store, log, "ann", 0).waits
    (users.parent / "data.sqlite").write_text("torn")
    with pytest.raises(StoreError, match=r"data.sqlite: cannot be read: file is not a database"):
        delete_returned(users)


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("predictions/users.jsonl", f'{{"user": "ann", "prompt": "{SECRET}\n{{"user": "bob"}}\n\n{{"user": "ann"}}\n'),
        ("predictions/users.jsonl", f'{{"user": "ann"}}\n"\ud800{SECRET}\n'),
        ("users.json", f'{{"users": [{{"user": "ann", "said": "{SECRET}'),
        ("routing.json", f'["ann", "{SECRET}"]'),
        ("data/truth.json", '{"groups": {"ann": 1'),
        ("data/truth.json", '["ann"]'),
        ("data/interactions.jsonl", f'{{"user_id": "ann", "input": "{SECRET}'),
    ],
)
def test_what_is_damaged_keeps_nobody_from_being_deleted(
    users: Path, store: AdapterStore, log: InteractionLog, name: str, content: str, caplog: pytest.LogCaptureFixture
) -> None:
    path = users.parent / name
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(content.encode("utf-8", "surrogatepass"))
    assert not remove(store, log, "ann", 0).waits
    assert not left(users)
    assert str(path) in caplog.text
    assert ("bob" not in content) or path.read_text() == '{"user": "bob"}\n\n'
