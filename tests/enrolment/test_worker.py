"""A fit that fails for its user ends; one that fails because storage does not answer waits in the queue."""

from __future__ import annotations

from contextlib import closing
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest

from proper.adapters.bucket import BucketError
from proper.enrolment.worker import FitWorker
from proper.errors import StoreError, UnavailableError
from proper.interactions.log import InteractionLog, LogEntry


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
