"""The log: all or nothing, once per id, on the disk when it says so; and the queue that follows from it."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from proper.errors import InputError, StoreError
from proper.interactions import fit_statements
from proper.interactions.fit_queue import ATTEMPTS
from proper.interactions.log import ConflictError, ExistsError, InteractionLog, LogEntry

ONE, TWO = LogEntry("a prompt", "an answer", 3.0, "1"), LogEntry("another", "answer")


both = pytest.mark.parametrize("engine", ["sqlite", "postgresql"], indirect=True)


@pytest.fixture
def log(users: Path) -> Iterator[InteractionLog]:
    opened = InteractionLog(users)
    yield opened
    opened.close()


@both
def test_an_interaction_counts_once(log: InteractionLog) -> None:
    first = log.append("", "ann", [ONE, TWO, TWO], new=True)
    assert (first.accepted, first.duplicates) == (2, 1)
    again = log.append("", "ann", [TWO, ONE, LogEntry("new", "x")])
    assert (again.accepted, again.duplicates) == (1, 2)
    assert [each.prompt for each in log.interactions("", "ann")] == ["a prompt", "another", "new"]
    assert log.count("", "ann") == 3 and log.count("theirs", "ann") == 0 and not log.knows("theirs", "ann")


@both
@pytest.mark.parametrize("change", [{"prompt": "x"}, {"target": "x"}, {"time": None}])
def test_another_content_under_the_same_id_changes_nothing(log: InteractionLog, change: dict[str, None]) -> None:
    log.append("", "ann", [ONE])
    with pytest.raises(ConflictError, match="'1' of user 'ann' exists already with other content") as caught:
        log.append("", "ann", [TWO, replace(ONE, **change)])
    assert caught.value.at == 1 and log.count("", "ann") == 1
    log.append("theirs", "ann", [replace(ONE, **change)])


@both
def test_who_is_new_is_new_once(log: InteractionLog) -> None:
    log.append("", "ann", [], new=True)
    with pytest.raises(ExistsError):
        log.append("", "ann", [ONE], new=True)
    assert log.count("", "ann") == 0 and log.queue.fit("", "ann").state == "idle"
    assert list(log.users("")) == ["ann"] and list(log.users("", "ann")) == []


@both
def test_a_queue_is_first_come_first_served(log: InteractionLog) -> None:
    for user in ("bo", "ann", "cy"):
        log.append("", user, [ONE])
    log.append("", "bo", [TWO])
    taken = [log.queue.take() for _ in range(4)]
    assert [claim and claim.user for claim in taken] == ["bo", "ann", "cy", None]
    assert taken[0] is not None and taken[0].wanted == 2


@both
def test_work_is_there_until_the_last_fit_has_ended(log: InteractionLog) -> None:
    assert not log.queue.has_work()
    log.append("", "ann", [ONE])
    assert log.queue.has_work()
    claim = log.queue.take()
    assert claim is not None and log.queue.has_work(), "a fit whose process dies is queued again"
    log.queue.done(claim, 1, None)
    assert not log.queue.has_work()


def test_an_idle_worker_reads_no_fit_that_has_ended(log: InteractionLog) -> None:
    """It looks several times a second, and every user who was ever fitted has a row."""
    sql, constants = fit_statements.ANY_WAITING.text("sqlite")
    steps = [step for *_, step in log.database.read(f"EXPLAIN QUERY PLAN {sql}", constants)]
    assert any("USING" in step for step in steps) and not any(step.startswith("SCAN") for step in steps), steps


@both
def test_a_fit_goes_from_queued_to_done_and_again_for_what_came_meanwhile(log: InteractionLog) -> None:
    log.append("", "ann", [ONE])
    assert log.queue.fit("", "ann").state == "queued"
    claim = log.queue.take("", "ann")
    assert claim is not None and log.queue.advance(claim, 0.5, "trial")
    log.append("", "ann", [TWO])
    assert (log.queue.fit("", "ann").state, log.queue.fit("", "ann").progress) == ("fitting", 0.5)
    log.queue.done(claim, 3, None)
    assert (log.queue.fit("", "ann").state, log.queue.fit("", "ann").version) == ("queued", 3)
    claim = log.queue.take()
    assert claim is not None
    log.queue.fail(claim, "no luck")
    fit = log.queue.fit("", "ann")
    assert (fit.state, fit.message, fit.version) == ("failed", "no luck", 3)
    figures = log.queue.figures()
    assert (figures.queued, figures.fitting, figures.done, figures.failed) == (0, 0, 1, 1)


@both
def test_a_deleted_user_is_no_longer_behind_a_claim(log: InteractionLog) -> None:
    log.append("", "ann", [ONE])
    claim = log.queue.take()
    assert claim is not None
    with log.deleting("", "ann"):
        pass
    log.append("", "ann", [ONE])
    assert not log.queue.advance(claim, 1, "final")
    with log.queue.ending(claim) as stands:
        assert not stands
    log.queue.done(claim, 1, None)
    assert log.queue.fit("", "ann").state == "queued" and log.queue.figures().done == 0


@both
def test_a_deletion_that_fails_removes_nothing(log: InteractionLog) -> None:
    log.append("", "ann", [ONE])
    with pytest.raises(RuntimeError), log.deleting("", "ann"):
        raise RuntimeError
    assert log.count("", "ann") == 1


def test_what_a_dead_process_left_is_queued_again_but_not_for_ever(log: InteractionLog) -> None:
    log.append("", "ann", [ONE])
    for _ in range(ATTEMPTS):
        with log.queue.lock() as mine:
            assert mine and log.queue.take() is not None
    with log.queue.lock():
        assert log.queue.fit("", "ann").state == "failed"
    log.append("", "ann", [TWO])
    with log.queue.lock(), log.queue.lock(wait=False) as second:
        assert not second
        claim = log.queue.take()
        assert claim is not None
        log.queue.release(claim)
    assert log.queue.fit("", "ann").state == "queued"


def test_a_full_disk_is_one_clear_error(log: InteractionLog) -> None:
    log.append("", "ann", [ONE])
    pages = log.database.read("PRAGMA page_count")[0][0]
    log.database.read(f"PRAGMA max_page_count = {pages}")
    with pytest.raises(
        StoreError, match="interactions.sqlite: the log cannot be written: no space is left on the disk"
    ):
        log.append("", "ann", [LogEntry("x" * 100_000, "y")])
    log.database.read("PRAGMA max_page_count = 1000000")
    assert log.count("", "ann") == 1 and log.append("", "ann", [TWO]).accepted == 1


@both
def test_nothing_acknowledged_is_lost_to_a_kill(users: Path) -> None:
    """A process that dies by SIGKILL right after `append` returned."""
    code = """
import os, signal, sys
from pathlib import Path
from proper.interactions.log import InteractionLog, LogEntry
log = InteractionLog(Path(sys.argv[1]))
for number in range(20):
    log.append("", "ann", [LogEntry(f"prompt {number}", "x")])
os.kill(os.getpid(), signal.SIGKILL)
"""
    done = subprocess.run([sys.executable, "-c", code, str(users)], check=False, env=os.environ)
    assert done.returncode == -signal.SIGKILL
    log = InteractionLog(users)
    assert log.count("", "ann") == 20 and log.queue.fit("", "ann").state == "queued"
    log.close()


def test_deleted_texts_are_nowhere_in_the_files(tmp_path: Path) -> None:
    log = InteractionLog(tmp_path)
    entries = [
        LogEntry(f"marmalade {number} " + "x" * (number * 37 % 900), "kumquat", id=f"{number}") for number in range(200)
    ]
    for at in range(0, 200, 7):
        log.append("", f"user {at % 3}", [replace(each, prompt="plain") for each in entries[at : at + 7]])
        log.append("", "ann", entries[at : at + 7])
    with log.deleting("", "ann"):
        pass
    for path in tmp_path.iterdir():
        data = path.read_bytes()
        assert b"marmalade" not in data and b"ann" not in data, path
    assert log.count("", "user 1") > 0
    log.close()


@pytest.mark.parametrize("user", ["", " ", "null", "undefined", "NaN", "a\ud83d", "x" * 513, 7, None])
def test_an_id_that_is_nobodys_is_not_enrolled(log: InteractionLog, user: Any) -> None:
    with pytest.raises(InputError, match=r"^user .*: (an id is|the id is|this stands for|half of)"):
        log.append("", user, [], new=True)
    assert not log.knows("", str(user))


@both
def test_a_refused_enrolment_leaves_every_tombstone(log: InteractionLog) -> None:
    log.append("", "bob", [ONE], new=True)
    log.tombstones.add("", "ann")
    clash = [ONE, replace(ONE, target="x")]
    for others in ({"bob": [TWO]}, {"new": clash}, {"": [TWO]}):
        with pytest.raises(InputError):
            log.enrol_all("", {"ann": [ONE], **others})
        assert log.tombstones.has("", "ann") and not log.knows("", "ann"), "ann was deleted and is not enrolled"
    log.enrol_all("", {"ann": [ONE], "new": [TWO]})
    assert not log.tombstones.has("", "ann") and log.knows("", "ann") and log.knows("", "new")


@both
def test_a_tombstone_comes_back_when_the_commit_fails(log: InteractionLog, monkeypatch: pytest.MonkeyPatch) -> None:
    log.tombstones.add("", "ann")

    class Full(Exception):
        """What the disk says."""

    @contextmanager
    def failing(owner: object = None) -> Iterator[None]:
        with begun(owner):
            yield
            raise Full

    begun = log.database.transaction
    monkeypatch.setattr(log.database, "transaction", failing)
    with pytest.raises(Full):
        log.append("", "ann", [ONE], new=True)
    monkeypatch.undo()
    assert log.tombstones.has("", "ann") and not log.knows("", "ann")
