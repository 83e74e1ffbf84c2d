"""With PostgreSQL many processes fit users of one run: none works in the folder that another fits a user in."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import closing
from dataclasses import replace
from pathlib import Path

import pytest

import proper
from proper.adapters.records import MADE, UserRecord
from proper.adapters.store import AdapterStore
from proper.enrolment import lost_adapters, worker
from proper.enrolment.fit_user import Fitter, UserFit
from proper.enrolment.worker import FitWorker
from proper.interactions import fit_queue
from proper.interactions.log import InteractionLog, LogEntry
from proper.interactions.personal_files import work_folder
from proper.state_move import move_state
from tests.enrolment.conftest import Open
from tests.enrolment.lessons import HABIT, OTHER, lessons


@pytest.fixture
def shared(taught: Path, tmp_path: Path, postgresql: str) -> Path:
    """The small run, with its state in PostgreSQL."""
    run = Path(shutil.copytree(taught, tmp_path / "run"))
    move_state(run, postgresql)
    return run


@pytest.fixture
def other(shared: Path) -> Iterator[FitWorker]:
    """The worker of another process."""
    with closing(InteractionLog(shared / "users")) as log, closing(proper.load(shared)) as model:
        yield FitWorker(shared / "users", log, model.users.worker.fitter)


def entries(habit: dict[str, str], name: str) -> list[LogEntry]:
    rows = lessons(habit, 40, 8)
    return [LogEntry(row["prompt"], row["target"], None, f"{name}-{at}") for at, row in enumerate(rows)]


def contents(folder: Path) -> set[str]:
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*")}


def test_a_user_who_is_fitted_after_a_refresh_is_nobody_elses(
    shared: Path, other: FitWorker, opened: Open, monkeypatch: pytest.MonkeyPatch
) -> None:
    users = opened(shared).users
    with closing(AdapterStore(shared / "users")) as store:
        record, head = store.get("new", coded=True), store.head("new")
        assert record is not None and head is not None
        made = {"by": "refresh", "of": head.version, "refit": True}  # as a refresh marks who lost an adapter
        store.put([replace(record, tier="groups", adapter=None, metadata={**record.metadata, MADE: made})])
    work, fit, kept = work_folder(shared / "users", "", "new"), Fitter.fit, list[set[str]]()

    def fits(fitter: Fitter, asked: UserFit) -> UserRecord:
        found = fit(fitter, asked)
        if asked.user == "new":
            kept.append(contents(work))
            other.log.append("", "new", entries(HABIT, "more"))
            other.log.append("", "ann", entries(OTHER, "ann"))
            assert not other.fit_next("", "new")
            assert other.fit_next() and other.log.queue.fit("", "ann").state == "done"
            kept.append(contents(work))
        return found

    monkeypatch.setattr(Fitter, "fit", fits)
    assert lost_adapters.refit(users.worker.fitter(), users.store, users.log) == (1, 1)
    assert kept[0] and kept[0] == kept[1]
    assert other.log.queue.fit("", "new").state == "queued", "it does not know the new interactions"
    assert not work.exists()


def test_users_who_are_enrolled_together_are_nobody_elses(
    shared: Path, other: FitWorker, opened: Open, monkeypatch: pytest.MonkeyPatch
) -> None:
    users, tried = opened(shared).users, list[bool]()

    def on_progress(phase: str, share: float) -> None:
        if phase == "final":
            tried.append(other.fit_next("", "bo"))

    both = {name: entries(HABIT, name) for name in ("bo", "cy")}
    users.enrol_many(both, on_progress=on_progress)
    assert tried and not any(tried)
    assert [other.log.queue.fit("", name).state for name in both] == ["done", "done"]
    assert not any((shared / "users" / "fits").iterdir())


def test_claims_are_kept_while_a_batch_reports_nothing(shared: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fit_queue, "LEASE_SECONDS", 0.3)
    with closing(InteractionLog(shared / "users")) as log, closing(InteractionLog(shared / "users")) as theirs:
        log.append("", "bo", entries(HABIT, "bo"))
        claim = log.queue.take()
        assert claim is not None
        with log.queue.holding([claim]):
            with log.database.transaction():
                log.database.write("UPDATE fits SET lease = lease - 1000")
            while not log.database.read("SELECT 1 FROM fits WHERE lease > extract(epoch FROM clock_timestamp())"):
                pass
            with theirs.queue.lock():
                assert theirs.queue.take() is None
        assert theirs.queue.take() is not None, "a claim that was not ended is released"


@pytest.mark.parametrize("taken", [True, False])
def test_the_folder_of_a_fit_that_has_ended_is_not_taken_from_the_next_one(shared: Path, taken: bool) -> None:
    with closing(InteractionLog(shared / "users")) as log, closing(InteractionLog(shared / "users")) as theirs:
        log.append("", "bo", entries(HABIT, "bo"))
        claim, work = log.queue.take(), work_folder(shared / "users", "", "bo")
        assert claim is not None
        log.append("", "bo", entries(OTHER, "more"))  # meanwhile
        log.queue.done(claim, 1, None)
        assert (theirs.queue.take() is not None) if taken else True
        work.mkdir(parents=True)
        worker.remove_ended_work(log, shared / "users", claim)
        assert work.exists() is taken
