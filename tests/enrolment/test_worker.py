"""A fit that fails for its user ends; one that fails because of storage or the groups waits in the queue."""

from __future__ import annotations

import resource
import shutil
import signal
import sqlite3
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch

from proper.adapters.bucket import BucketError
from proper.adapters.store import AdapterStore
from proper.enrolment.worker import FitWorker
from proper.errors import ChangedError, StoreError, UnavailableError
from proper.files import write_text
from proper.interactions.log import InteractionLog, LogEntry
from proper.models.checkpoints import save_tensors
from tests.enrolment.conftest import Open
from tests.enrolment.lessons import HABIT, lessons


@contextmanager
def full() -> Iterator[None]:
    """Limit the size of files, which is as close to a full disk as a test can come without a disk of its own."""
    before, handler = resource.getrlimit(resource.RLIMIT_FSIZE), signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (4096, before[1]))
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, handler)


def text(folder: Path) -> None:
    with full():
        write_text(folder / "a.txt", "a" * 10_000)


def tensors(folder: Path) -> None:
    with full():
        save_tensors(folder / "a.safetensors", {"a": torch.zeros(10_000)}, {})


def rows(_: Path) -> None:
    with closing(sqlite3.connect(":memory:")) as database:
        database.execute("CREATE TABLE a(b)")
        database.execute("PRAGMA max_page_count = 2")
        try:
            database.execute("INSERT INTO a VALUES (zeroblob(100000))")
        except sqlite3.Error as error:
            raise StoreError("the log cannot be written") from error


@pytest.mark.parametrize("write", [text, tensors, rows])
def test_a_fit_waits_until_the_disk_has_room(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, write: Callable[[Path], None]
) -> None:
    monkeypatch.setattr(FitWorker, "_fit", lambda *_: write(tmp_path))
    fitter = SimpleNamespace(model=SimpleNamespace(served=None), placer=SimpleNamespace(encoder=None))
    with closing(InteractionLog(tmp_path / "users")) as log:
        log.append("", "ann", [LogEntry("a prompt", "an answer")])
        worker = FitWorker(tmp_path / "users", log, lambda: cast(Any, fitter))
        for _ in range(5):  # more often than processes may die during a fit
            with pytest.raises(UnavailableError, match="fits wait until there is room again: .*cannot be written"):
                worker.fit_next()
        assert log.queue.fit("", "ann").state == "queued"


def test_a_fit_for_groups_that_were_refreshed_meanwhile_is_not_stored(
    taught: Path, tmp_path: Path, opened: Open
) -> None:
    run = Path(shutil.copytree(taught, tmp_path / "run"))
    users = opened(run).users

    def refreshed(*_: Any) -> None:
        with closing(AdapterStore(run / "users")) as store:
            store.put([], bound={"groups": "others"})

    with pytest.raises(ChangedError, match="belongs to other groups meanwhile"):
        users.enrol("late", lessons(HABIT, 100, 6), refreshed)
    assert users.head("late") is None and users.log.queue.fit("", "late").state == "queued"
    with pytest.raises(ChangedError, match="start it again"):
        users.update("late")


@pytest.mark.parametrize(
    ("error", "states"),
    [
        (UnavailableError("the database does not answer"), ("queued", "queued")),
        (BucketError("no such bucket"), ("queued", "queued")),
        (StoreError("an adapter is damaged"), ("failed", "queued")),
    ],
)
def test_a_fit_waits_while_storage_does_not_answer(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: Exception, states: tuple[str, str]
) -> None:
    def fit(*_: object) -> None:
        raise error

    monkeypatch.setattr(FitWorker, "_fit", fit)
    fitter = SimpleNamespace(model=SimpleNamespace(served=None), placer=SimpleNamespace(encoder=None))
    with closing(InteractionLog(tmp_path / "users")) as log:
        for user in ("ann", "bob"):
            log.append("", user, [LogEntry("a prompt", "an answer")])
        worker = FitWorker(tmp_path / "users", log, lambda: cast(Any, fitter))
        if states[0] == "queued":
            for _ in range(5):  # more often than processes may die during a fit
                with pytest.raises(UnavailableError):
                    worker.fit_next()
        else:
            assert worker.fit_next()
        assert (log.queue.fit("", "ann").state, log.queue.fit("", "bob").state) == states
        claim = log.queue.take()
        assert claim is not None and claim.user == ("ann" if states[0] == "queued" else "bob")
