"""`proper users enrol` and `update`: what they print, what they say to bad rows, and the worker under signals."""

from __future__ import annotations

import json
import os
import shutil
import signal
import sqlite3
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

from proper.adapters.store import AdapterStore
from proper.cli.app import main
from proper.interactions.deletion import remove
from proper.interactions.fit_queue import Fit
from proper.interactions.log import InteractionLog, LogEntry
from proper.interactions.personal_files import work_folder

Output = pytest.CaptureFixture[str]


@pytest.fixture
def run(tiny_run: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny_run, tmp_path / "run"))


def written(path: Path, rows: list[Any]) -> str:
    path.write_text("".join(f"{row if isinstance(row, str) else json.dumps(row)}\n" for row in rows), encoding="utf-8")
    return str(path)


ROWS = [{"input": f"Thing number {at}?", "output": ("yes", "no")[at % 2], "timestamp": at} for at in range(6)]


def test_enrol_update_delete(run: Path, tmp_path: Path, capsys: Output) -> None:
    rows = written(tmp_path / "rows.jsonl", ROWS)
    assert main(["users", "enrol", str(run), "--user", "ann", "--input", rows]) == 0
    out, err = capsys.readouterr()
    user, tier, version = out.strip().split("\t")
    assert (user, version) == ("ann", "1") and tier in ("groups", "users")
    assert "6 logged" in err and "the run's data is gone" in err
    more = written(tmp_path / "more.jsonl", [{"prompt": "Final text.", "target": "yes", "id": 1}, *ROWS])
    assert main(["users", "update", str(run), "--user", "ann", "--input", more]) == 0
    out, err = capsys.readouterr()
    assert out.split("\t")[2] == "1\n"
    assert "not promoted: " in err and "; version 1 stays" in err
    assert main(["users", "drift", str(run), "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert (told["user"], told["version"], told["new"]) == ("ann", 1, 1) and "Final" not in str(told)
    assert main(["users", "update", str(run), "--drifted", "--budget", "1"]) == 0
    capsys.readouterr()
    assert main(["users", "update", str(run), "--user", "u0", "--input", rows]) == 0
    assert capsys.readouterr().out.startswith("u0\t")
    assert main(["users", "delete", str(run), "--user", "ann"]) == 0
    capsys.readouterr()
    for path in run.rglob("*"):
        assert not path.is_file() or b"Final text." not in path.read_bytes()


def test_many_users_of_one_file(run: Path, tmp_path: Path, capsys: Output) -> None:
    users = {"ann": ROWS, "bo": ROWS[:2], "cy": ROWS[:1]}
    path = written(tmp_path / "rows.jsonl", [{**row, "user_id": user} for user, own in users.items() for row in own])
    assert main(["users", "enrol", str(run), "--input", path]) == 0
    out, _ = capsys.readouterr()
    printed = [line.split("\t") for line in out.splitlines()]
    assert [user for user, _, _ in printed] == [*users] and {tier for _, tier, _ in printed} <= {"groups", "users"}
    assert main(["users", "enrol", str(run), "--input", path]) == 2
    assert f"{path}: user 'ann' exists already" in capsys.readouterr().err
    other = written(tmp_path / "other.jsonl", [{**ROWS[0], "user_id": "dan"}, ROWS[1]])
    assert main(["users", "enrol", str(run), "--input", other]) == 2
    assert f"{other}:2: user_id: missing" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("rows", "said"),
    [
        ([ROWS[0], "{"], ":2: row: not JSON"),
        ([{"input": "x"}, {"output": "y"}], ":1: output: missing (and 1 more bad row)"),
        ([{**ROWS[0], "user_id": "bo"}], ":1: user_id: is another user's"),
        ([{**ROWS[0], "timestamp": "soon"}], ":1: timestamp: 'soon' is not a time"),
        ([{**ROWS[0], "id": True}], ":1: id: should be text"),
        ([], ": there is no interaction in it"),
    ],
)
def test_bad_rows_are_named_and_leave_nothing(
    run: Path, tmp_path: Path, capsys: Output, rows: list[Any], said: str
) -> None:
    path = written(tmp_path / "rows.jsonl", rows)
    assert main(["users", "enrol", str(run), "--user", "ann", "--input", path]) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.count("\n") == 1 and f"{path}{said}" in err
    assert not (run / "users" / "interactions.sqlite").exists()


def test_usage_errors_are_one_line(run: Path, tmp_path: Path, capsys: Output) -> None:
    rows = written(tmp_path / "rows.jsonl", ROWS)
    twice = written(tmp_path / "twice.jsonl", [{**row, "id": "a", "user_id": "ann"} for row in ROWS[:2]])
    contradicts = f"{twice}: the interaction 'a' of user 'ann' exists already with other content"
    for arguments, said in (
        (["enrol", str(run), "--user", "u0", "--input", rows], "--user u0: exists already"),
        (["enrol", str(run), "--user", "ann", "--input", twice], contradicts),
        (["enrol", str(run), "--input", twice], contradicts),
        (["update", str(run), "--user", "nobody", "--input", rows], "--user nobody: no such user"),
        (["update", str(run), "--input", rows], "--input: the user is missing"),
        (["update", str(run), "--watch", "--user", "u0"], "--watch: fits all queued users"),
        (["update", str(run), "--budget", "3"], "--budget and --hours go with --drifted"),
        (["update", str(run), "--parent", "3"], "--parent goes with --watch"),
        (["update", str(run), "--drifted", "--user", "u0"], "--drifted: chooses the users itself"),
        (["update", str(run), "--drifted", "--input", rows], "--drifted: chooses the users itself"),
        (["enrol", str(run), "--user", "ann", "--input", str(tmp_path / "no.jsonl")], "no.jsonl: cannot be read"),
    ):
        assert main(["users", *arguments]) == 2
        err = capsys.readouterr().err
        assert err.count("\n") == 1 and said in err
    assert main(["users", "update", str(run)]) == 0
    assert capsys.readouterr().err.endswith("no user is queued\n")


Start = Callable[..., subprocess.Popen[bytes]]


@pytest.fixture
def start(run: Path) -> Any:
    started: list[subprocess.Popen[bytes]] = []

    def begin() -> subprocess.Popen[bytes]:
        command = [sys.executable, "-m", "proper", "users", "update", str(run), "--watch"]
        started.append(subprocess.Popen(command, env=os.environ, stderr=subprocess.PIPE))
        return started[-1]

    yield begin
    for process in started:
        process.kill()
        process.communicate()


def until(log: InteractionLog, user: str, right: Callable[[Fit], bool]) -> Fit:
    deadline = time.monotonic() + 200
    while not right(fit := log.queue.fit("", user)):
        assert time.monotonic() < deadline, fit
        time.sleep(0.005)
    return fit


MANY = [LogEntry(f"Thing number {at}?", ("yes", "no")[at % 2]) for at in range(60)]


@pytest.mark.slow  # two processes that load the model, and a long fit
def test_a_worker_killed_in_a_fit_goes_on_and_ends_the_same(run: Path, tmp_path: Path, start: Start) -> None:
    with closing(InteractionLog(run / "users")) as log:
        log.append("", "ann", MANY)
        first = start()
        seen = until(log, "ann", lambda fit: fit.state == "fitting" and fit.progress > 0.2)
        first.send_signal(signal.SIGKILL)
        first.wait()
        assert log.queue.fit("", "ann").state == "fitting", f"it was killed at {seen}"
        second = start()
        fit = until(log, "ann", lambda fit: fit.state == "done")
        assert fit.version == 1 and log.queue.figures().done == 1
        second.send_signal(signal.SIGTERM)
        assert second.wait(timeout=30) == 0
    alone = Path(shutil.copytree(run, tmp_path / "alone"))
    with closing(AdapterStore(run / "users")) as store, closing(AdapterStore(alone / "users")) as again:
        again.delete("ann")
        with closing(InteractionLog(alone / "users")) as log:
            log.queue.add("", "ann")
        assert main(["users", "update", str(alone)]) == 0
        one, other = store.get("ann"), again.get("ann")
    assert one is not None and other is not None and one.metadata == other.metadata and one.tier == other.tier
    assert one.embedding.equal(other.embedding)
    assert all(tensor.equal((other.adapter or {})[name]) for name, tensor in (one.adapter or {}).items())


def test_a_deleted_user_comes_back_by_an_enrolment_only_and_without_the_past(
    run: Path, tmp_path: Path, capsys: Output
) -> None:
    rows = written(tmp_path / "rows.jsonl", ROWS[:1])
    with closing(InteractionLog(run / "users")) as log, closing(AdapterStore(run / "users")) as store:
        log.append("", "ann", [LogEntry("Long ago.", "yes")])
        with closing(sqlite3.connect(log.database.path, isolation_level=None)) as reader:
            reader.execute("BEGIN")
            reader.execute("SELECT count(*) FROM interactions").fetchone()
            assert remove(store, log, "ann", 0).waits
            for command in ("enrol", "update"):
                assert main(["users", command, str(run), "--user", "ann", "--input", rows]) == 2
                out, err = capsys.readouterr()
                assert out == "" and err.count("\n") == 1 and "Traceback" not in err
        assert main(["users", "check", str(run)]) == 0
        capsys.readouterr()
        assert main(["users", "update", str(run), "--user", "ann", "--input", rows]) == 2
        assert (
            capsys.readouterr().err
            == f"proper: --user ann: no such user in {run / 'users'}; 'proper users list' prints all\n"
        )
        assert store.head("ann") is None and not log.knows("", "ann")
        assert main(["users", "enrol", str(run), "--user", "ann", "--input", rows]) == 0
        assert store.head("ann") is not None
        assert [each.prompt for each in log.interactions("", "ann")] == ["Thing number 0?"]


def test_sigterm_queues_again_and_a_deleted_user_does_not_come_back(run: Path, start: Start) -> None:
    with closing(InteractionLog(run / "users")) as log, closing(AdapterStore(run / "users")) as store:
        log.append("", "ann", MANY)
        worker = start()
        until(log, "ann", lambda fit: fit.state == "fitting" and fit.progress > 0.05)
        worker.send_signal(signal.SIGTERM)
        _, said = worker.communicate(timeout=30)
        assert worker.returncode == 0 and b"ann" not in said
        assert log.queue.fit("", "ann").state == "queued"
        worker = start()
        until(log, "ann", lambda fit: fit.state == "fitting" and fit.progress > 0.3)
        removal = remove(store, log, "ann")
        assert removal.found and not removal.waits
        assert not any(b"Thing number" in path.read_bytes() for path in run.rglob("*") if path.is_file())
        log.append("", "bo", [LogEntry("x", "y")])
        until(log, "bo", lambda fit: fit.state == "done")
        assert store.head("ann") is None and log.queue.fit("", "ann").state == "idle"
        assert not work_folder(run / "users", "", "ann").exists()
        # The folder goes after the fit is recorded as done: until then a killed fit is told from a new one by it.
        deadline = time.monotonic() + 20
        while left := [*(run / "users" / "fits").iterdir()]:
            assert work_folder(run / "users", "", "bo").name in left[0].name and time.monotonic() < deadline
            assert len(left) == 1
            time.sleep(0.005)
