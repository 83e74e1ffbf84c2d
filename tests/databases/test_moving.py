"""The state of a run moves between SQLite and PostgreSQL: all of it, or nothing; never two places."""

from __future__ import annotations

import signal
import subprocess
import sys
from contextlib import closing
from pathlib import Path
from typing import Any

import psycopg
import pytest
import torch

from proper.adapters.store import AdapterStore, UserRecord
from proper.adapters.tombstones import Tombstones
from proper.cli.app import main
from proper.databases.location import location_of
from proper.databases.postgresql.connections import alone
from proper.errors import InputError, RunFolderError, StoreError
from proper.interactions.deletion import remove
from proper.interactions.log import DeletedError, InteractionLog, LogEntry
from proper.serving.keys import FILE, Keys
from proper.state_move import move_state

NAMES = ("ann", "bo", "cy\ud800", "δ")


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A run folder with two tenants' users, versions, interactions, fits, a deleted user and a key."""
    folder = tmp_path / "run"
    folder.mkdir()
    (folder / "config.yaml").write_text("{}")
    draw = torch.Generator().manual_seed(0)
    for tenant in ("", "acme"):
        with closing(AdapterStore(folder / "users", tenant)) as store, closing(InteractionLog(folder / "users")) as log:
            for _ in range(2):
                store.put(
                    UserRecord(name, "users", torch.randn(4, generator=draw), {"a": torch.randn(2, 9, generator=draw)})
                    for name in NAMES
                )
            for name in NAMES:
                log.append(tenant, name, [LogEntry(f"{name[:2]} {at}", "x", 1.5 * at, str(at)) for at in range(3)])
            remove(store, log, "bo")
            claim = log.queue.take(tenant, "ann")
            assert claim is not None
    with closing(Keys(folder / FILE)) as keys:
        keys.add("acme", ["write"])
    return folder


def content(run: Path) -> dict[str, Any]:
    """Everything that a run's state says, by the classes that the rest of the package uses."""
    found: dict[str, Any] = {}
    for tenant in ("", "acme"):
        with closing(AdapterStore(run / "users", tenant)) as store, closing(InteractionLog(run / "users")) as log:
            found[tenant] = [
                [
                    name,
                    store.versions(name),
                    None if (record := store.get(name)) is None else [record.metadata, record.adapter["a"].tolist()],  # type: ignore[index]
                    log.interactions(tenant, name),
                    log.queue.fit(tenant, name),
                    Tombstones(run / "users").has(tenant, name),
                ]
                for name in NAMES
            ]
            found[f"{tenant} figures"] = [log.queue.figures(), store.manifest.shards(), list(store.metadata())]
    with closing(Keys(run / FILE)) as keys:
        found["keys"] = [keys.principals(), keys.required]
    return found


def schemas(url: str) -> set[str]:
    with psycopg.connect(url) as connection:
        rows = connection.execute("SELECT nspname FROM pg_namespace WHERE nspname LIKE 'proper_%'").fetchall()
    return {name for (name,) in rows}


def state_files(run: Path) -> set[str]:
    """What a run with its state in PostgreSQL does not have."""
    names = {path.relative_to(run).as_posix() for path in run.rglob("*") if path.is_file()}
    return {
        each for each in names if each.startswith(("users/users.sqlite", "users/interactions", "tombstones", "serv"))
    }


def test_there_and_back_nothing_is_lost_and_nothing_stays(run: Path, postgresql: str, capsys: Any) -> None:
    before, known = content(run), schemas(postgresql)
    assert main(["move-state", str(run), "--store", postgresql]) == 0
    place = location_of(run / "users")
    assert place is not None and schemas(postgresql) == {*known, place.schema}
    assert content(run) == before and state_files(run) <= {"serving/keys.lock"}
    assert int(capsys.readouterr().out.split()[0]) > 30
    with closing(InteractionLog(run / "users")) as log, log.queue.lock():
        assert log.queue.fit("", "ann").state == "queued", "the claim of a worker that died before"
        with pytest.raises(DeletedError):
            log.append("", "bo", [LogEntry("a", "b")])
    after = content(run)
    assert move_state(run, postgresql) == 0 and content(run) == after
    assert main(["move-state", str(run), "--store", "folder"]) == 0
    assert location_of(run / "users") is None and schemas(postgresql) == known
    assert content(run) == after
    assert not (run / "moving.json").exists() and not list(run.glob(".*"))
    with closing(AdapterStore(run / "users")) as store, closing(InteractionLog(run / "users")) as log:
        store.put([UserRecord("new", "users", torch.ones(4), {"a": torch.ones(2, 9)})])
        assert log.append("", "new", [LogEntry("a", "b")]).accepted == 1


@pytest.mark.parametrize("first", ["sqlite", "postgresql"])
def test_numbers_are_not_given_out_again(first: str, run: Path, postgresql: str) -> None:
    if first == "postgresql":
        move_state(run, postgresql)
    with closing(AdapterStore(run / "users")) as store:
        last = store.manifest.new_shard()
        with store.manifest.transaction():
            store.manifest.drop_shard(last)
    move_state(run, postgresql if first == "sqlite" else None)
    with closing(AdapterStore(run / "users")) as store:
        assert store.manifest.new_shard() == last + 1


def test_a_used_or_impossible_run_is_not_moved(run: Path, postgresql: str) -> None:
    before, known = content(run), schemas(postgresql)
    with closing(InteractionLog(run / "users")), pytest.raises(RunFolderError, match="another process has it open"):
        move_state(run, postgresql)
    for url in ("mysql://a/b", "mysql://a:secret@b/c", "folders"):
        with pytest.raises(InputError, match="--store.*: (not|has a password)") as error:
            move_state(run, url)
        assert "secret" not in str(error.value)
    assert str(error.value) == "--store: not a URL; write postgresql://USER@HOST/DATABASE, or 'folder'"
    with pytest.raises(StoreError, match="refused"):
        move_state(run, "postgresql://nobody@127.0.0.1:1/x")
    with closing(InteractionLog(run / "users")) as log:
        log.append("", "ann", [LogEntry("a\0b", "x", None, "nul")])
    with pytest.raises(InputError, match="NUL"):
        move_state(run, postgresql)
    assert location_of(run / "users") is None and schemas(postgresql) == known
    assert not (run / "moving.json").exists()
    after = content(run)
    assert after["keys"] == before["keys"] and len(after[""][0][3]) == 4


HOLDS = """
import sys
from pathlib import Path
from proper.interactions.log import InteractionLog, LogEntry
log = InteractionLog(Path(sys.argv[1]))
for number, _ in enumerate(sys.stdin):
    print(log.append("", "ann", [LogEntry(f"p {number}", "x")]).accepted, flush=True)
"""


@pytest.mark.parametrize("engine", ["sqlite", "postgresql"])
def test_a_process_that_uses_the_state_keeps_it_where_it_is(engine: str, run: Path, postgresql: str) -> None:
    if engine == "postgresql":
        move_state(run, postgresql)
    place, target = location_of(run / "users"), None if engine == "postgresql" else postgresql
    command = [sys.executable, "-c", HOLDS, str(run / "users")]

    def accepted(process: subprocess.Popen[str]) -> int:
        assert process.stdin is not None and process.stdout is not None
        process.stdin.write("one\n")
        process.stdin.flush()
        return int(process.stdout.readline())

    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert accepted(process) == 1
        with pytest.raises(RunFolderError, match="another process .*; stop the run's server"):
            move_state(run, target)
        if place is not None:
            with psycopg.connect(postgresql) as connection:  # the server was restarted
                mine = "WHERE pid <> pg_backend_pid() AND application_name = 'proper'"
                connection.execute(f"SELECT pg_terminate_backend(pid) FROM pg_stat_activity {mine}")
        assert accepted(process) == 1
        with pytest.raises(RunFolderError, match="another process"):
            move_state(run, target)
        assert accepted(process) == 1 and location_of(run / "users") == place
        process.kill()
    assert move_state(run, target) > 30
    with closing(InteractionLog(run / "users")) as log:
        assert len(log.interactions("", "ann")) == 6


def test_no_process_connects_while_the_state_moves(run: Path, postgresql: str) -> None:
    move_state(run, postgresql)
    place = location_of(run / "users")
    assert place is not None
    command = [sys.executable, "-m", "proper", "keys", "list", str(run)]
    with alone(place), closing(InteractionLog(run / "users")) as log:
        assert log.interactions("", "ann"), "the process that moves it reads it"
        other = subprocess.run(command, capture_output=True, text=True, check=False)
    assert other.stderr == f"proper: {place}: another process moves this state; wait until it has ended\n"
    assert other.returncode == 2
    with closing(InteractionLog(run / "users")) as log:
        assert log.interactions("", "ann")


POINTS = ("make_schema", "copy_tables", "_switch", "_finish")
KILLED = """
import os, signal, sys
from pathlib import Path
from proper import state_move
from proper.databases.postgresql import database
module, name = (database if sys.argv[3] == "make_schema" else state_move), sys.argv[3]
original, calls, when = getattr(module, name), [], sys.argv[4]
def dies(*arguments):
    calls.append(1)
    if name == "_finish" and len(calls) == 1:  # the one that begins a move
        return original(*arguments)
    if when == "after":
        original(*arguments)
    os.kill(os.getpid(), signal.SIGKILL)
setattr(module, name, dies)
state_move.move_state(Path(sys.argv[1]), sys.argv[2] or None)
"""


@pytest.mark.slow
@pytest.mark.parametrize("back", [False, True])
@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("point", POINTS)
def test_a_kill_leaves_the_state_in_one_place(point: str, when: str, back: bool, run: Path, postgresql: str) -> None:
    if back and point == "make_schema":
        pytest.skip("SQLite files have no schema")
    known = schemas(postgresql)
    if back:
        move_state(run, postgresql)
    before = content(run)
    url = "" if back else postgresql
    died = subprocess.run([sys.executable, "-c", KILLED, str(run), url, point, when], check=False)
    assert died.returncode == -signal.SIGKILL
    assert content(run) == before, "before the command is called again"
    move_state(run, url or None)
    place = location_of(run / "users")
    assert content(run) == before and (place is None) is back
    assert schemas(postgresql) - known == (set() if place is None else {place.schema})
    assert not (run / "moving.json").exists() and (back or state_files(run) <= {"serving/keys.lock"})
