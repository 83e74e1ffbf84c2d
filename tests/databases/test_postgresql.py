"""State in PostgreSQL: chosen once, migrated, taken by many workers, deleted, and not lost to a kill."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch

from proper.adapters.store import AdapterStore, UserRecord
from proper.adapters.tombstones import Tombstones
from proper.cli.app import main
from proper.databases import tables
from proper.databases.location import Location, location_of
from proper.databases.setup import keep_state
from proper.databases.shared import open_run
from proper.enrolment.worker import FitWorker
from proper.errors import InputError, StoreError, UnavailableError
from proper.files import write_json
from proper.interactions.deletion import finish_deletions, remove
from proper.interactions.fit_queue import Fit
from proper.interactions.log import DeletedError, InteractionLog, LogEntry
from proper.interactions.log_check import check_log
from proper.interactions.verification import fingerprint, verify
from proper.run_folder import RunFolder
from proper.serving.keys import FILE, Keys

both = pytest.mark.parametrize("engine", ["sqlite", "postgresql"], indirect=True)
ENTRY = LogEntry("a prompt", "an answer", 3.0, "1")


@pytest.fixture
def engine(request: pytest.FixtureRequest) -> str:
    return str(getattr(request, "param", "postgresql"))


@pytest.fixture
def log(users: Path) -> Iterator[InteractionLog]:
    with closing(InteractionLog(users)) as opened:
        yield opened


def place(users: Path) -> Location:
    found = location_of(users)
    assert found is not None
    return found


def connect(users: Path) -> Any:
    import psycopg

    location = place(users)
    return psycopg.connect(location.url, autocommit=True, options=f"-c search_path={location.schema}")


def test_a_place_is_chosen_once(users: Path, postgresql: str, tmp_path: Path) -> None:
    run = users.parent
    keep_state(run, postgresql)
    assert set(json.loads((run / "database.json").read_text())) == {"url", "schema"}
    with pytest.raises(InputError, match="the state of this run is in postgresql://"):
        keep_state(run, "postgresql://other@127.0.0.1/x")
    for url, why in (
        ("postgresql://a:secret@127.0.0.1/x", "has a password"),
        ("postgresql://127.0.0.1", "not the URL of a PostgreSQL database"),
        ("mysql://127.0.0.1/x", "not the URL of a PostgreSQL database"),
        ("nonsense", "not a URL"),
    ):
        with pytest.raises(InputError, match=why):
            keep_state(tmp_path / "new", url)
    with pytest.raises(StoreError, match="postgresql://nobody@127.0.0.1:1/x .*refused"):
        keep_state(tmp_path / "new", "postgresql://nobody@127.0.0.1:1/x")
    assert not (tmp_path / "new").exists()
    InteractionLog(tmp_path / "lite" / "users").close()
    with pytest.raises(InputError, match="the state of this run is in its folder already"):
        keep_state(tmp_path / "lite", postgresql)


def test_the_migrations_make_the_tables_of_the_package(users: Path) -> None:
    from alembic.autogenerate import compare_metadata
    from alembic.runtime.migration import MigrationContext
    from sqlalchemy import MetaData, create_engine

    location = place(users)
    options = {"options": f"-c search_path={location.schema}"}
    engine = create_engine(location.url.replace("postgresql:", "postgresql+psycopg:"), connect_args=options)
    wanted = MetaData()
    for metadata in (tables.STORE, tables.LOG, tables.RUN):
        for table in metadata.sorted_tables:
            table.to_metadata(wanted)
    with engine.connect() as connection:
        assert compare_metadata(MigrationContext.configure(connection), wanted) == []
    engine.dispose()


def test_a_lost_schema_and_a_newer_one_are_named(users: Path) -> None:
    with connect(users) as connection:
        connection.execute("UPDATE alembic_version SET version_num = 'later'")
        with pytest.raises(StoreError, match="a newer version of proper has migrated it"):
            InteractionLog(users)
        connection.execute(f"DROP SCHEMA {place(users).schema} CASCADE")
    with pytest.raises(StoreError, match="there is no such schema, so the state of the run is lost"):
        InteractionLog(users)


def test_a_server_that_is_away_is_no_damage(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("psycopg")
    (tmp_path / "users").mkdir()
    (tmp_path / "config.yaml").write_text("data: {path: x}\n", encoding="utf-8")
    with socket.socket() as nobody:  # bound, but it does not listen
        nobody.bind(("127.0.0.1", 0))
        url = f"postgresql://proper@127.0.0.1:{nobody.getsockname()[1]}/x"
        write_json(RunFolder(tmp_path).database, {"url": url, "schema": "proper_0"})
        assert main(["users", "check", str(tmp_path), "--repair"]) == 1
    said = capsys.readouterr()
    assert said.out == "" and "found" not in said.err and said.err.startswith(f"proper: {url}")


def test_a_text_that_postgresql_cannot_hold_is_bad_input(log: InteractionLog) -> None:
    with pytest.raises(InputError, match="NUL"):
        log.append("", "ann", [LogEntry("a\0b", "x")])
    assert not log.knows("", "ann")


def test_a_client_notices_that_the_machine_of_the_server_is_gone(users: Path, log: InteractionLog) -> None:
    with log.database.transaction():
        connection = log.database._backend._current()  # type: ignore[attr-defined]
        with socket.socket(fileno=os.dup(connection.fileno())) as own:
            names = (socket.TCP_KEEPIDLE, socket.TCP_KEEPINTVL, socket.TCP_KEEPCNT, socket.TCP_USER_TIMEOUT)
            assert [own.getsockopt(socket.IPPROTO_TCP, name) for name in names] == [30, 10, 3, 60_000]


def test_a_dropped_connection_is_replaced(users: Path, log: InteractionLog) -> None:
    log.append("", "ann", [ENTRY])
    end = "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE application_name = 'proper'"
    with connect(users) as connection:
        connection.execute(end)
        assert log.count("", "ann") == 1
        connection.execute(end)
        assert log.append("", "bo", [ENTRY]).accepted == 1
        with pytest.raises(UnavailableError), log.database.transaction():
            connection.execute(end)
            log.knows("", "ann")
        assert log.knows("", "ann")


TAKE = """
import sys, time
from pathlib import Path
from proper.interactions.log import InteractionLog
log = InteractionLog(Path(sys.argv[1]))
print("ready", flush=True)
sys.stdin.readline()
while (claim := log.queue.take()) is not None:
    log.queue.advance(claim, 0.5, "fit")
    time.sleep(0.01)
    log.queue.done(claim, 1, None)
    print(claim.user, flush=True)
"""


def test_many_workers_take_each_user_once(users: Path, log: InteractionLog) -> None:
    names = [f"u{at}" for at in range(30)]
    for name in names:
        log.append("", name, [ENTRY])
    command = [sys.executable, "-c", TAKE, str(users)]
    pipes: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    workers = [subprocess.Popen(command, **pipes) for _ in range(3)]
    for worker in workers:
        assert worker.stdout is not None and worker.stdout.readline() == "ready\n"
    for worker in workers:
        assert worker.stdin is not None
        worker.stdin.write("go\n")
        worker.stdin.flush()
    taken = [worker.communicate()[0].split() for worker in workers]
    assert Counter(user for each in taken for user in each) == Counter(names)
    assert sum(bool(each) for each in taken) > 1, "more than one worker had something to do"
    assert log.queue.figures().done == 30


def test_the_claim_of_a_dead_worker_comes_back_and_of_a_live_one_stays(users: Path, log: InteractionLog) -> None:
    for name in ("ann", "bo"):
        log.append("", name, [ENTRY])
    dead, live = log.queue.take(), log.queue.take()
    assert dead is not None and live is not None
    with connect(users) as connection:
        connection.execute("UPDATE fits SET lease = lease - 1000")
    assert log.queue.advance(live, 0.5, "fit")
    with log.queue.lock() as mine:
        assert mine and log.queue.take() is not None and log.queue.take() is None
    assert not log.queue.advance(dead, 0.5, "fit") and log.queue.fit("", "bo").state == "fitting"


def test_a_deletion_waits_for_the_worker_that_fits_the_user(users: Path, log: InteractionLog) -> None:
    log.append("", "ann", [ENTRY])
    claim = log.queue.take()
    assert claim is not None
    with log.deleting("", "ann"):
        pass
    with connect(users) as connection:
        (row,) = connection.execute('SELECT state, tenant FROM fits WHERE "user" <> %s', (b"ann",)).fetchall()
        assert row == ("withdrawn", "") and check_log(users) == []
    assert not log.queue.noticed(0.2) and not log.queue.advance(claim, 0.6, "fit")
    waits = threading.Thread(target=log.queue.noticed, args=(60.0,))
    waits.start()
    log.queue.leave(claim)
    waits.join(10)
    assert not waits.is_alive() and log.queue.noticed(0.0)


def test_who_asks_for_a_fit_waits_for_the_worker_that_has_it(users: Path, log: InteractionLog) -> None:
    log.append("", "ann", [ENTRY])
    claim = log.queue.take()
    assert claim is not None
    fitter = SimpleNamespace(model=SimpleNamespace(served=None), placer=SimpleNamespace(encoder=None))
    worker = FitWorker(users, log, lambda: cast(Any, fitter))
    found: list[Fit] = []
    waits = threading.Thread(target=lambda: found.append(worker.fit("", "ann")))
    waits.start()
    time.sleep(1)
    assert waits.is_alive()
    log.queue.done(claim, 3, "better")
    waits.join(60)
    assert [(fit.state, fit.version, fit.message) for fit in found] == [("done", 3, "better")]


def test_a_deletion_does_not_wait_for_a_dead_worker_without_end(users: Path, log: InteractionLog) -> None:
    """The lease of a killed worker runs out after minutes; a client that deletes the user is answered before."""
    log.append("", "ann", [ENTRY])
    assert log.queue.take() is not None
    with closing(AdapterStore(users)) as store:
        begun = time.monotonic()
        removal = remove(store, log, "ann", patience=0.2)
    assert time.monotonic() - begun < 60
    assert removal.waits == (f"{users}: a fit of a deleted user has not ended yet",)
    assert finish_deletions(users) == list(removal.waits), "the deletion is not over before the worker is"
    with connect(users) as connection:
        connection.execute("UPDATE fits SET lease = lease - 1000")
    assert finish_deletions(users) == [] and log.deletions.pending() == []


def test_a_writer_waits_no_longer_than_it_should(users: Path) -> None:
    from proper.interactions.database import Database

    with closing(Database(RunFolder(users.parent).users.log, wait_seconds=0.1)) as one:
        other = Database(RunFolder(users.parent).users.log)
        with one.transaction():
            pass
        entered, leave = threading.Event(), threading.Event()

        def hold() -> None:
            with other.transaction():
                entered.set()
                leave.wait(10)

        holder = threading.Thread(target=hold)
        holder.start()
        entered.wait(10)
        with (
            pytest.raises(StoreError, match="the log cannot be written: .*lock timeout"),
            one.transaction(("", b"ann")),
        ):
            pass
        leave.set()
        holder.join()
        other.close()


@both
def test_tombstones(users: Path, log: InteractionLog) -> None:
    marks, other = Tombstones(users), Tombstones(users)
    assert not marks.has("", "ann") and marks.of_tenant("") is None
    marks.add("", "ann")
    assert other.has("", "ann") and not other.has("theirs", "ann") and not other.has("", "bo")
    deleted = other.of_tenant("")
    assert deleted is not None and deleted("ann") and not deleted("bo")
    with pytest.raises(DeletedError):
        log.append("", "ann", [ENTRY])
    with closing(AdapterStore(users)) as store:
        for count in (1, 40):
            store.put(UserRecord(name, "groups", torch.ones(1)) for name in ["ann", *(f"u{at}" for at in range(count))])
            assert store.head("ann") is None and store.head("u0") is not None
    log.append("", "ann", [ENTRY], new=True)
    assert not marks.has("", "ann")


@both
def test_keys(users: Path) -> None:
    path = users.parent / FILE
    with closing(Keys(path)) as keys, closing(Keys(path)) as again:
        assert not keys.required and len(keys) == 0 and keys.principal("x") is None
        key = keys.add("a", ["write", "generate"])
        found = keys.principal(key)
        assert found is not None and (found.tenant, found.scopes) == ("a", ("generate", "write"))
        assert again.required and again.principals() == [found]
        with pytest.raises(InputError, match="revoke them first"):
            again.open()
        with pytest.raises(InputError, match="no key 'nonsense'"):
            again.revoke("nonsense")
        again.revoke(found.id)
        assert again.principal(key) is None and again.required and _required(path)
        keys.open()
        assert not _required(path)
    if (database := open_run(users.parent)) is not None:
        with closing(database):
            assert not path.exists() and database.read("SELECT count(*) FROM api_keys") == [(0,)]


def _required(path: Path) -> bool:
    with closing(Keys(path)) as keys:
        return keys.required


def test_closed_keys_hold_no_connection(users: Path) -> None:
    count = "SELECT count(*) FROM pg_stat_activity WHERE application_name = 'proper'"
    with connect(users) as watching:
        (before,) = watching.execute(count).fetchone()
        with closing(Keys(users.parent / FILE)) as keys:
            keys.add("", ["admin"])
            assert watching.execute(count).fetchone() == (before + 1,)
        deadline = time.monotonic() + 10
        while watching.execute(count).fetchone() != (before,):
            assert time.monotonic() < deadline
            time.sleep(0.01)


def test_a_deleted_user_is_in_no_row_and_the_certificate_says_what_was_searched(users: Path) -> None:
    run = users.parent
    (run / "config.yaml").write_text("{}")
    with closing(AdapterStore(users)) as store, closing(InteractionLog(users)) as log:
        for name in ("ann-of-the-hill", "bo"):
            store.put([UserRecord(name, "users", torch.randn(16), {"a": torch.randn(4, 16)})])
            log.append("", name, [LogEntry(f"{name} likes marmalade on toast", "kumquats, says " + name)])
        prints = fingerprint(store, log, "ann-of-the-hill", b"salt" * 4)
        before = verify(run, [("ann-of-the-hill", prints)])
        places = {(each["read_as"], each["kind"]) for each in before.certificate["users"][0]["found"]}
        assert {("rows", "id"), ("rows", "text"), ("rows", "tensor"), ("store", "id"), ("log", "id")} <= places
        assert remove(store, log, "ann-of-the-hill").waits == ()
    after = verify(run, [("ann-of-the-hill", prints)])
    assert after.clean, after.certificate["users"]
    (rows,) = (each for each in after.certificate["searched"]["each"] if each["read_as"] == ["rows"])
    assert rows["file"] == str(place(users)) and rows["bytes"] > 0
    assert any("PostgreSQL" in text for text in after.certificate["not_covered"])
    assert finish_deletions(users) == [] and Tombstones(users).has("", "ann-of-the-hill")
    with closing(AdapterStore(users)) as store:
        assert [user for user, _ in store.users()] == ["bo"]


def test_state_in_postgresql_leaves_no_database_in_the_folder(users: Path) -> None:
    with closing(AdapterStore(users)) as store, closing(InteractionLog(users)) as log:
        store.put([UserRecord("ann", "groups", torch.ones(1))])
        log.append("", "ann", [ENTRY])
        Tombstones(users).add("", "bo")
        with closing(Keys(users.parent / FILE)) as keys:
            keys.add("", ["admin"])
    names = {path.name for path in users.parent.rglob("*") if path.is_file()}
    assert names == {"database.json", "users.lock"}


@pytest.mark.slow
def test_a_kill_in_a_transaction_leaves_all_or_nothing(users: Path, log: InteractionLog) -> None:
    code = """
import os, signal, sys, threading, time
from pathlib import Path
from proper.interactions.log import InteractionLog, LogEntry
log = InteractionLog(Path(sys.argv[1]))
number = int(sys.argv[2])
threading.Thread(target=lambda: (sys.stdin.readline(), os.kill(os.getpid(), signal.SIGKILL)), daemon=True).start()
while True:
    log.append("", "ann", [LogEntry(f"p {number} {at}", "x") for at in range(20)])
    print(number, flush=True)
    number += 1
"""
    acknowledged, number = 0, 0
    for round_ in range(10):
        command = [sys.executable, "-c", code, str(users), str(number)]
        with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
            assert process.stdin is not None and process.stdout is not None
            acknowledged = int(process.stdout.readline())
            time.sleep(0.003 * round_)
            process.stdin.write("die\n")
            process.stdin.flush()
            acknowledged = max([acknowledged, *map(int, process.stdout.read().split())])
        counts = Counter(each.prompt.split()[1] for each in log.interactions("", "ann"))
        assert set(counts.values()) == {20}, "each batch is whole"
        assert {str(at) for at in range(acknowledged + 1)} <= set(counts), "what was acknowledged is there"
        number = len(counts)
    assert log.queue.fit("", "ann").state == "queued"
