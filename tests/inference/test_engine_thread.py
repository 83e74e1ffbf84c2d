"""An engine on its own thread: answers arrive, an idle one sleeps, stopping leaves no request waiting."""

from __future__ import annotations

import threading
import time
from pathlib import Path

import pytest

from proper.inference import load
from proper.inference.engine import Engine
from proper.inference.engine_thread import EngineThread
from proper.inference.requests import EngineLimits, Event, Finished, Request
from proper.inference.sampling import Sampling


class Last:
    """Waits for the end of one request."""

    def __init__(self) -> None:
        self.done = threading.Event()
        self.reason: str | None = None

    def __call__(self, event: Event) -> None:
        if isinstance(event, Finished):
            self.reason = event.reason
            self.done.set()


def test_answers_drain_and_stop(tiny_run: Path) -> None:
    model = load(tiny_run)
    runner = EngineThread(Engine(model, EngineLimits(rows=2, slots=2)))
    runner.start()
    sinks = [Last() for _ in range(8)]
    for at, sink in enumerate(sinks):
        runner.engine.submit(Request((5, 6, 7), f"u{at}", sampling=Sampling(4)), sink)
    assert runner.drain(60) and all(sink.done.is_set() for sink in sinks)
    late, waiting = Last(), Last()
    runner.engine.submit(Request((5,), "u0", sampling=Sampling(60)), late).cancel()
    assert late.done.wait(60)
    time.sleep(0.05)
    steps = runner.engine.stats().steps
    time.sleep(0.05)
    assert runner.engine.stats().steps == steps, "with nothing to do it sleeps"
    runner.engine.submit(Request((5,), "u0", sampling=Sampling(60)), waiting)
    runner.stop()
    assert waiting.done.is_set() and not runner.alive and runner.error is None
    model.close()


def test_rows_that_end_with_their_first_token_leave_nobody_waiting(tiny_run: Path) -> None:
    model = load(tiny_run)
    runner = EngineThread(Engine(model, EngineLimits(rows=2, slots=1)))
    sinks = [Last() for _ in range(9)]
    for at, sink in enumerate(sinks):
        runner.engine.submit(Request((5, 6), f"u{at}" if at % 3 else None, sampling=Sampling(1)), sink)
    runner.start()
    assert runner.drain(60) and all(sink.reason == "length" for sink in sinks)
    runner.stop()
    model.close()


def test_a_loop_that_breaks_tells_those_who_wait(tiny_run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = load(tiny_run)
    runner = EngineThread(Engine(model))

    def broken() -> None:
        raise ZeroDivisionError

    monkeypatch.setattr(runner.engine, "step", broken)
    sink, ended = Last(), threading.Event()
    runner.on_error = ended.set
    runner.engine.submit(Request((5,), sampling=Sampling(4)), sink)
    runner.start()
    assert ended.wait(60)
    runner.stop()
    assert isinstance(runner.error, ZeroDivisionError) and sink.reason == "error"
    assert runner.engine.stats().errors == 1 and runner.engine.idle
    model.close()
