"""A client that stops reading: the row goes on without it, and after a while its place is somebody else's."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from fastapi import FastAPI

from proper.inference import load
from proper.inference.engine import Engine
from proper.inference.engine_thread import EngineThread
from proper.inference.requests import EngineLimits
from proper.serving.app import ServeSettings, create_app
from proper.serving.keys import Keys
from proper.serving.limits import ServeLimits

STALLED = 2.0
"""Seconds; the engine makes the few tokens of an answer in far less."""
TOKENS = 5


@pytest.fixture
def served(long_run: Path, tmp_path: Path) -> Iterator[tuple[FastAPI, Engine]]:
    """An application of one row and one place, with its engine at work."""
    model = load(long_run)
    engine = Engine(model, EngineLimits(rows=1, slots=1))
    runner = EngineThread(engine)
    limits = ServeLimits(open_requests=1, stalled_seconds=STALLED)
    app = create_app(runner, Keys(tmp_path / "keys.json"), ServeSettings("tiny", limits=limits), [].append)
    runner.start()
    yield app, engine
    runner.stop()
    model.close()


async def ask(app: FastAPI, reads: asyncio.Event) -> tuple[int, str]:
    """Ask for a stream, whose pieces are taken only while `reads` is set; return status and what came."""
    body = {"model": "tiny", "prompt": "Well?", "user": "u0", "stream": True, "max_tokens": TOKENS}
    asked = [{"type": "http.request", "body": json.dumps(body).encode(), "more_body": False}]
    headers = [(b"content-type", b"application/json"), (b"host", b"localhost")]
    path = {"path": "/v1/completions", "raw_path": b"/v1/completions", "query_string": b"", "root_path": ""}
    asgi = {"version": "3.0", "spec_version": "2.3"}
    scope = {"type": "http", "method": "POST", "scheme": "http", "http_version": "1.1", "headers": headers}
    said: list[dict[str, Any]] = []

    async def receive() -> dict[str, Any]:
        if asked:
            return asked.pop()
        await asyncio.Event().wait()  # it does not go away
        raise AssertionError

    async def send(message: Any) -> None:
        if message["type"] == "http.response.body":
            await reads.wait()
        said.append(message)

    await app({**scope, **path, "server": ("localhost", 80), "asgi": asgi}, receive, send)
    return said[0]["status"], b"".join(message.get("body", b"") for message in said[1:]).decode()


def test_one_who_reads_nothing_holds_no_row_and_loses_the_place(served: tuple[FastAPI, Engine]) -> None:
    app, engine = served

    async def both() -> tuple[tuple[int, str], tuple[int, str], tuple[int, str]]:
        never, always = asyncio.Event(), asyncio.Event()
        always.set()
        slow = asyncio.create_task(ask(app, never))
        deadline = time.monotonic() + 60
        while engine.stats().tokens.get("users", 0) < TOKENS or not engine.idle:
            assert time.monotonic() < deadline
            await asyncio.sleep(0.001)
        assert not slow.done(), "the row has come to its end with nobody reading"
        refused = await ask(app, always)
        stalled = await asyncio.wait_for(slow, 60)
        return stalled, refused, await ask(app, always)

    stalled, refused, after = asyncio.run(both())
    assert stalled == (200, "") and refused[0] == 429
    assert after[0] == 200 and after[1].endswith("data: [DONE]\n\n")


def test_one_who_reads_in_time_gets_all(served: tuple[FastAPI, Engine]) -> None:
    app, _ = served

    async def one() -> tuple[int, str]:
        reads = asyncio.Event()
        asking = asyncio.create_task(ask(app, reads))
        await asyncio.sleep(STALLED / 10)
        reads.set()
        return await asking

    status, text = asyncio.run(one())
    assert status == 200 and text.endswith("data: [DONE]\n\n")
