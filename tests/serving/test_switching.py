"""A server takes a new run while requests are answered: none fails, and running ones finish on the former run."""

from __future__ import annotations

import asyncio
import itertools
import shutil
import threading
import time
from collections.abc import AsyncIterator, Iterator
from concurrent.futures import ThreadPoolExecutor, wait
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path

import httpx
import pytest
from fastapi import FastAPI

from proper.adapters.store import AdapterStore
from proper.errors import ProperError, RunFolderError
from proper.inference import load
from proper.inference.engine import Engine
from proper.inference.engine_thread import EngineThread
from proper.inference.requests import EngineLimits
from proper.run_folder import RunFolder
from proper.serving.app import ServeSettings, create_app
from proper.serving.keys import FILE, Keys
from proper.serving.server import free_port, make_server
from proper.serving.switching import SwitchableApp


@pytest.fixture
def link(long_run: Path, tmp_path: Path) -> Path:
    """A link to a copy of the run; beside it is another copy, without the user `u0`."""
    for name in ("first", "second"):
        shutil.copytree(long_run, tmp_path / name)
    store = AdapterStore(RunFolder(tmp_path / "second").users.path)
    store.delete("u0")
    store.close()
    (tmp_path / "current").symlink_to("first")
    return tmp_path / "current"


def lead(link: Path, name: str) -> None:
    """Let the link lead to another run at once."""
    link.with_name("next").symlink_to(name)
    link.with_name("next").replace(link)


@contextmanager
def served(app: SwitchableApp) -> Iterator[str]:
    """Serve an application in the block; yields its URL."""
    server, bound = make_server(app, 10), free_port("127.0.0.1", 0)
    thread = threading.Thread(target=server.run, args=([bound],))
    thread.start()
    while not server.started:
        time.sleep(0.01)
    yield f"http://127.0.0.1:{bound.getsockname()[1]}"
    server.should_exit = True
    thread.join()
    app.close()
    bound.close()


def test_requests_go_on_while_a_run_takes_the_place_of_another(link: Path) -> None:
    opened: list[str] = []

    @contextmanager
    def application() -> Iterator[FastAPI]:
        run = link.resolve()
        opened.append(run.name)
        if run.name == "broken":
            raise RunFolderError("not a run")
        model = load(run)
        yield create_app(EngineThread(Engine(model, EngineLimits(4))), Keys(run / FILE), ServeSettings("tiny"), print)
        model.close()
        opened.append(f"closed {run.name}")

    app = SwitchableApp(application)
    with served(app) as url:
        stop, seen = threading.Event(), list[tuple[int, str]]()

        def ask(length: int) -> httpx.Response:
            body = {"model": "tiny", "prompt": "Well?", "user": "u0", "max_tokens": length}
            return httpx.post(f"{url}/v1/completions", json=body, timeout=60)

        def keep_asking() -> None:
            while not stop.is_set():
                reply = ask(3)
                seen.append((reply.status_code, reply.json()["proper"]["tier"]))

        with ThreadPoolExecutor(5) as threads:
            try:
                work = [threads.submit(keep_asking) for _ in range(4)]
                long = threads.submit(ask, 150)
                while len(seen) < 8:
                    time.sleep(0.01)
                lead(link, "second")
                app.renew()
                assert long.result().json()["proper"]["tier"] == "users", "it began on the former run"
                after = len(seen)
                while len(seen) < after + 8:
                    time.sleep(0.01)
                lead(link, "broken")
                with pytest.raises(RunFolderError):
                    app.renew()
                assert ask(3).json()["proper"]["tier"] == "none", "the server goes on with the run that it has"
            finally:
                stop.set()
            for each in work:
                each.result()
        assert {status for status, _ in seen} == {200}
        assert {tier for _, tier in seen[:4]} == {"users"} and {tier for _, tier in seen[after + 4 :]} == {"none"}
    assert opened == ["first", "second", "closed first", "broken", "closed second"]


def test_two_switches_at_once_close_no_run_that_is_in_use() -> None:
    release, closed, numbers = threading.Event(), list[int](), itertools.count()

    @contextmanager
    def application() -> Iterator[FastAPI]:
        number, app = next(numbers), FastAPI()

        @app.get("/number")
        async def answer(slow: bool = False) -> list[int | bool]:
            while slow and not release.is_set():
                await asyncio.sleep(0.01)
            return [number, number in closed]

        yield app
        closed.append(number)

    app = SwitchableApp(application)
    with served(app) as url, ThreadPoolExecutor(3) as threads:
        try:
            slow = threads.submit(httpx.get, f"{url}/number", params={"slow": True}, timeout=60)
            while app._current is None or not app._current.open:
                time.sleep(0.01)
            switches = [threads.submit(app.renew) for _ in range(2)]  # SIGHUP was sent twice
            wait(switches, timeout=0.5)
            assert closed == [], "the first run still answers"
        finally:
            release.set()
        for each in switches:
            each.result(60)
        assert slow.result().json() == [0, False] and closed == [0, 1]
        assert httpx.get(f"{url}/number").json() == [2, False]
    assert closed == [0, 1, 2]


@pytest.mark.parametrize("stopped", [False, True])
def test_a_server_that_stops_during_a_switch_starts_no_run_and_says_why(stopped: bool) -> None:
    opening, ending, release = threading.Event(), threading.Event(), threading.Event()
    numbers, living = itertools.count(), list[int]()

    @contextmanager
    def application() -> Iterator[FastAPI]:
        number = next(numbers)

        @asynccontextmanager
        async def lifespan(_: FastAPI) -> AsyncIterator[None]:
            living.append(number)
            yield
            ending.set()
            while not (stopped or release.is_set()):
                await asyncio.sleep(0.01)
            living.remove(number)

        if number:
            opening.set()
            assert (release if stopped else ending).wait(60)
        yield FastAPI(lifespan=lifespan)

    app = SwitchableApp(application)
    with ThreadPoolExecutor(1) as threads:
        with served(app):
            renewal = threads.submit(app.renew)
            assert opening.wait(60)
            if not stopped:
                renewal.add_done_callback(lambda _: release.set())
        release.set()
        with pytest.raises(ProperError, match="the server has stopped"):
            renewal.result(60)
    assert living == []
