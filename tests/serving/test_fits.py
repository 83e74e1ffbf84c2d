"""From an interaction over HTTP to another answer: the worker beside the server, versions that land, and kills."""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import httpx
import pytest

from proper.adapters.store import AdapterStore
from proper.inference import load
from proper.inference.generate import generate
from proper.interactions.log import InteractionLog
from proper.serving.fit_process import FitProcess

if TYPE_CHECKING:
    from tests.serving.conftest import Serve

HISTORY = [{"input": f"Thing number {at}?", "output": ("yes", "no")[at % 2], "id": f"{at}"} for at in range(12)]


def until(right: Callable[[], Any], seconds: float = 200) -> Any:
    deadline = time.monotonic() + seconds
    while not (found := right()):
        assert time.monotonic() < deadline
        time.sleep(0.02)
    return found


def ended(client: httpx.Client, user: str, version: int | None = None) -> Any:
    """The user's card once a fit has made this version, or has ended with whatever version."""

    def look() -> Any:
        card = client.get(f"/v1/users/{user}").json()
        assert card["fit"]["state"] != "failed", card
        right = version is None or card["fit"]["version"] == version
        return card if card["fit"]["state"] == "done" and right else None

    return until(look)


def test_what_is_taught_is_what_answers(serve: Serve, tiny_run: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(tiny_run, tmp_path / "tiny"))
    running = serve(folder, fits=True)
    assert running.worker is not None
    with running.client() as client:

        def answer(user: str) -> tuple[str, Any]:
            reply = client.post("/v1/completions", json={"model": "tiny", "prompt": "Well?", "user": user}).json()
            return reply["choices"][0]["text"], reply["proper"].get("version")

        nobody, version = answer("ann")
        assert version is None and client.get("/readyz").json() == {"status": "ready", "worker": "alive"}
        assert client.post("/v1/users", json={"user": "ann", "interactions": HISTORY}).json()["version"] is None
        card = ended(client, "ann", 1)
        assert card["tier"] in ("groups", "users") and card["version"] == 1 and card["fit"]["progress"] == 1
        with closing(load(folder)) as alone:
            assert answer("ann") == (generate(alone, ["Well?"], ["ann"])[0], 1)

        for user in ("ann", "u0"):
            lesson = {"interactions": [{"input": f"Another {at}?", "output": "yes"} for at in range(6)]}
            assert client.post(f"/v1/users/{user}/interactions", json=lesson).json()["accepted"] == 6
            taught = ended(client, user)
            assert taught["interactions"] == (18 if user == "ann" else 6)
        with closing(load(folder)) as alone:
            assert answer("u0") == (generate(alone, ["Well?"], ["u0"])[0], taught["version"])

        figures = running.figures()
        assert (figures["proper_fits_done_total"], figures["proper_fits_queued"]) == (3, 0)
        assert (figures["proper_fits_failed_total"], figures["proper_fit_worker_up"]) == (0, 1)
        os.kill(running.worker.pid, signal.SIGKILL)
        until(lambda: running.worker.restarts == 1 and client.get("/healthz").json()["worker"] == "alive")
        assert client.delete("/v1/users/ann").status_code == 200
        assert answer("ann") == (nobody, None)
    assert any("ended with code -9" in line for line in running.log)
    assert not any("ann" in line for line in running.log)


def test_a_version_that_lands_in_the_middle_of_an_answer(serve: Serve, long_run: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(long_run, tmp_path / "tiny"))
    running = serve(folder)
    with closing(load(folder)) as alone:
        old = generate(alone, ["Well?"], ["u0"], max_new_tokens=150)[0]
        new = generate(alone, ["Well?"], ["u1"], max_new_tokens=150)[0]
    body = {"model": "tiny", "prompt": "Well?", "user": "u0", "max_tokens": 150}
    with (
        closing(AdapterStore(folder / "users")) as store,
        running.client() as client,
        running.client() as other,
        client.stream("POST", "/v1/completions", json={**body, "stream": True}) as reply,
    ):
        lines = (line for line in reply.iter_lines() if line)
        first = next(lines)
        record = store.get("u1")
        assert record is not None
        store.put([replace(record, user="u0")])
        said = other.post("/v1/completions", json=body).json()
        rest = [first, *lines]
    pieces = [httpx.Response(200, content=line.removeprefix("data: ")).json() for line in rest if "[DONE]" not in line]
    assert {piece["proper"]["version"] for piece in pieces} == {1} and said["proper"]["version"] == 2
    text = "".join(piece["choices"][0]["text"] for piece in pieces if piece["choices"])
    assert text.strip() == old.strip() and said["choices"][0]["text"].strip() == new.strip() and old != new


Begin = Callable[..., tuple[subprocess.Popen[str], str]]


@pytest.fixture
def begin(tiny_run: Path, tmp_path: Path) -> Iterator[tuple[Begin, Path]]:
    """Start `proper serve` on a copy of the tiny run."""
    folder = Path(shutil.copytree(tiny_run, tmp_path / "tiny"))
    started: list[subprocess.Popen[str]] = []

    def start(*more: str) -> tuple[subprocess.Popen[str], str]:
        command = [sys.executable, "-m", "proper", "serve", str(folder), "--port", "0", *more]
        process = subprocess.Popen(command, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True)
        started.append(process)
        assert process.stderr is not None
        said = ""
        while not (found := re.search(r"on (http://\S+)", said)):
            line = process.stderr.readline()
            assert line, said
            said += line
        return process, found[1]

    yield start, folder
    for process in started:
        process.kill()
        process.communicate()


@pytest.mark.slow
def test_what_was_acknowledged_survives_a_kill_and_is_fitted(begin: tuple[Begin, Path]) -> None:
    start, folder = begin
    server, url = start()
    until(lambda: ready(url))
    with httpx.Client(base_url=url, timeout=60) as client:
        assert client.post("/v1/users", json={"user": "ann", "interactions": HISTORY}).status_code == 200
        server.send_signal(signal.SIGKILL)
    server.wait()
    with closing(InteractionLog(folder / "users")) as log:
        assert log.count("", "ann") == len(HISTORY)
    server, url = start()
    until(lambda: ready(url))
    with httpx.Client(base_url=url, timeout=60) as client:
        again = client.post("/v1/users/ann/interactions", json={"interactions": HISTORY}).json()
        assert (again["accepted"], again["duplicates"]) == (0, len(HISTORY))
        ended(client, "ann", 1)
    server.send_signal(signal.SIGTERM)
    _, said = server.communicate(timeout=60)
    assert server.returncode == 0 and "proper: stopped" in said and "ann" not in said


def ready(url: str) -> bool:
    try:
        return httpx.get(f"{url}/readyz").status_code == 200
    except httpx.ConnectError:
        return False


def test_a_worker_that_dies_is_started_again_and_stopped_for_good() -> None:
    lines: list[str] = []
    worker = FitProcess([sys.executable, "-c", "import time; time.sleep(600)"], lines.append, pause=0.01)
    assert not worker.alive
    worker.start()
    for restarts in (1, 2):
        first = worker.pid
        assert first is not None and worker.alive
        os.kill(first, signal.SIGKILL)
        until(lambda restarts=restarts: worker.restarts == restarts and worker.alive, 30)
        assert worker.pid != first
    worker.stop()
    assert not worker.alive and [line.rpartition(" in ")[2] for line in lines] == ["0.01 s", "0.02 s"]


def test_one_that_does_not_listen_is_killed() -> None:
    deaf = (
        "import signal, sys, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); sys.stderr.close(); time.sleep(600)"
    )
    worker = FitProcess([sys.executable, "-c", deaf], [].append, grace=0.2)
    worker.start()
    time.sleep(0.3)
    worker.stop()
    assert not worker.alive
