"""Two replicas on a real Ray cluster here, behind the HTTP server: answers, affinity, limits, kills, drain."""

from __future__ import annotations

import asyncio
import json
import os
import shutil
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import httpx
import pytest
import yaml
from fastapi import FastAPI

from proper.adapters.store import AdapterStore
from proper.inference import load
from proper.inference.generate import generate
from proper.inference.requests import EngineLimits, EngineStats
from proper.run_folder import RunFolder
from proper.serving.app import ServeSettings, create_app
from proper.serving.keys import FILE, Keys
from proper.serving.limits import ServeLimits
from proper.serving.server import Server, free_port, make_server
from proper.serving.switching import SwitchableApp

# Ray warns of its own deprecated settings. Its start takes a minute on a busy machine.
pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("default"), pytest.mark.timeout(900)]

ROWS = 4
OPEN = 64
"""Most prompts that run or wait, over all replicas."""
USERS = [f"u{at}" for at in range(64)]
PROMPTS = ("What does this say?", "Short", "A rather longer text: what does it say, and to whom?", "Well?")


@dataclass
class Served:
    """The HTTP server with its replicas."""

    url: str
    link: Path
    runners: list[Any]
    app: SwitchableApp
    server: Server
    thread: threading.Thread
    log: list[str] = field(default_factory=list)

    def complete(self, user: str, prompt: Any, length: int, **more: Any) -> httpx.Response:
        body = {"model": "tiny", "user": user, "prompt": prompt, "max_tokens": length, **more}
        return httpx.post(f"{self.url}/v1/completions", json=body, timeout=120)

    def stats(self) -> EngineStats:
        stats: EngineStats = self.runners[-1].engine.stats()
        return stats

    def each(self) -> dict[str, EngineStats]:
        """The figures of each replica."""
        return dict(self.runners[-1].engine._on_all("figures"))


@pytest.fixture(scope="module")
def run64(tiny_run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny run with 64 users and longer rows."""
    folder = Path(shutil.copytree(tiny_run, tmp_path_factory.mktemp("replicas") / "tiny"))
    raw: dict[str, Any] = yaml.safe_load((folder / "config.yaml").read_text(encoding="utf-8"))
    raw["compute"]["max_length"] = 250
    (folder / "config.yaml").write_text(yaml.safe_dump(raw), encoding="utf-8")
    store = AdapterStore(RunFolder(folder).users.path)
    for at in range(8, 64):
        record = store.get(f"u{at % 8}")
        assert record is not None and record.adapter is not None
        adapter = {name: tensor * (1 + at / 32) for name, tensor in record.adapter.items()}
        store.put([replace(record, user=f"u{at}", adapter=adapter)])
    store.close()
    return folder


@pytest.fixture(scope="module")
def expected(run64: Path) -> Iterator[Callable[[str, str, int], str]]:
    """`expected(user, prompt, length)`: what `proper generate` answers."""
    model, known = load(run64), dict[tuple[str, str, int], str]()

    def answer(user: str, prompt: str, length: int) -> str:
        if (user, prompt, length) not in known:
            known[user, prompt, length] = generate(model, [prompt], [user], max_new_tokens=length)[0]
        return known[user, prompt, length]

    yield answer
    model.close()


@pytest.fixture(scope="module")
def served(run64: Path) -> Iterator[Served]:
    from proper.cluster.deployment import replicas_on

    log, runners = list[str](), list[Any]()
    settings = ServeSettings("tiny", limits=ServeLimits(open_requests=OPEN))
    link = run64.with_name("current")
    link.symlink_to(run64.name)
    with replicas_on("local:2", "current", EngineLimits(ROWS, slots=80), None, 60.0) as replicas:

        @contextmanager
        def application() -> Iterator[FastAPI]:
            run = link.resolve()
            with replicas.serving(run) as runner:
                runners.append(runner)
                yield create_app(runner, Keys(run / FILE), settings, log.append)

        app = SwitchableApp(application)
        server = make_server(app, 60)
        bound = free_port("127.0.0.1", 0)
        thread = threading.Thread(target=server.run, args=([bound],))
        thread.start()
        while not server.started:
            assert thread.is_alive()
            time.sleep(0.01)
        yield Served(f"http://127.0.0.1:{bound.getsockname()[1]}", link, runners, app, server, thread, log)
        server.should_exit = True
        thread.join()
        app.close()
        bound.close()


def streamed(lines: Iterator[str]) -> str:
    """The text of a stream of server-sent events; fails on an error."""
    text = ""
    for line in lines:
        if line.startswith("data: {"):
            event = json.loads(line.removeprefix("data: "))
            assert "error" not in event, event
            text += "".join(choice["text"] for choice in event["choices"])
    return text


def test_a_user_s_requests_go_to_the_replica_with_the_adapter(
    served: Served, expected: Callable[[str, str, int], str]
) -> None:
    asked = USERS[:16]
    for _ in range(3):
        for user in asked:
            assert served.complete(user, PROMPTS[1], 3).json()["choices"][0]["text"] == expected(user, PROMPTS[1], 3)
    figures = served.each()
    assert len(figures) == 2
    assert sum(stats.adapters.loads for stats in figures.values()) == len(asked), "each adapter is in one replica"
    assert all(stats.adapters.loads > 0 for stats in figures.values()), "both replicas have users"


def test_64_users_at_once_get_what_generate_answers(served: Served, expected: Callable[[str, str, int], str]) -> None:
    asked = [(user, PROMPTS[at % 4], 3 + at % 4) for at, user in enumerate(USERS)]

    async def one(client: httpx.AsyncClient, user: str, prompt: str, length: int) -> httpx.Response:
        body = {"model": "tiny", "user": user, "prompt": prompt, "max_tokens": length}
        return await client.post(f"{served.url}/v1/completions", json=body)

    async def everybody() -> list[httpx.Response]:
        limits = httpx.Limits(max_connections=64)
        async with httpx.AsyncClient(timeout=120, limits=limits) as client:
            return await asyncio.gather(*(one(client, *each) for each in asked))

    for each, reply in zip(asked, asyncio.run(everybody()), strict=True):
        assert reply.json()["choices"][0]["text"] == expected(*each)


def test_answers_are_streamed_token_by_token(served: Served, expected: Callable[[str, str, int], str]) -> None:
    for user in USERS[:4]:
        body = {"model": "tiny", "user": user, "prompt": PROMPTS[0], "max_tokens": 40, "stream": True}
        with httpx.stream("POST", f"{served.url}/v1/completions", json=body, timeout=120) as reply:
            lines = list(reply.iter_lines())
        assert streamed(iter(lines)) == expected(user, PROMPTS[0], 40)
        assert sum(line.startswith("data: {") for line in lines) > 10 and lines[-2] == "data: [DONE]"


def test_limits_hold_over_all_replicas_and_a_full_one_spills(
    served: Served, expected: Callable[[str, str, int], str]
) -> None:
    before = served.each()
    held = {"model": "tiny", "user": "u9", "prompt": [PROMPTS[0]] * 8, "max_tokens": 150, "stream": True}
    with httpx.stream("POST", f"{served.url}/v1/completions", json=held, timeout=120) as reply:
        lines = reply.iter_lines()  # kept: without it, the stream would be closed
        next(lines)
        refused = served.complete("u5", [PROMPTS[0]] * OPEN, 2)
    assert refused.status_code == 429 and refused.json()["error"]["code"] == "rate_limited"
    whole = served.complete("u5", [PROMPTS[0]] * 32, 20)
    assert {choice["text"] for choice in whole.json()["choices"]} == {expected("u5", PROMPTS[0], 20)}
    steps = [stats.prompt_tokens - before[name].prompt_tokens for name, stats in served.each().items()]
    assert min(steps) > 0, "one user's requests fill the owner, and the other replica gets the rest"


def test_metrics_of_all_replicas_are_one_scrape(served: Served) -> None:
    lines = httpx.get(f"{served.url}/metrics", timeout=60).text.splitlines()
    figures = {name: float(value) for name, _, value in (line.rpartition(" ") for line in lines if line[0] != "#")}
    assert figures["proper_replicas"] == 2 and figures["proper_slots"] == 160
    assert figures["proper_adapter_loads_total"] == sum(stats.adapters.loads for stats in served.each().values())
    assert figures['proper_requests_total{reason="length",tier="users"}'] >= 64


def test_a_deleted_user_leaves_the_memory_of_all_replicas(served: Served) -> None:
    before = served.stats().resident
    assert httpx.delete(f"{served.url}/v1/users/u7", timeout=60).status_code == 200
    until(lambda: served.stats().resident < before)
    assert served.complete("u7", PROMPTS[1], 3).json()["proper"]["tier"] == "none"


def test_a_replica_is_killed_and_nothing_is_lost(served: Served, expected: Callable[[str, str, int], str]) -> None:
    stop, wrong, statuses = threading.Event(), list[Any](), list[int]()
    acknowledged: list[str] = []

    def ask(user: str) -> None:
        while not stop.is_set():
            reply = served.complete(user, PROMPTS[0], 30)
            statuses.append(reply.status_code)
            if reply.status_code == 200:
                text = reply.json()["choices"][0]["text"]
                if text != expected_of[user]:
                    wrong.append((user, text))
            elif reply.status_code != 503 or "retry-after" not in reply.headers:
                wrong.append((user, reply.text))

    def tell(user: str) -> None:
        at = 0
        while not stop.is_set():
            at += 1
            row = {"id": f"{user}-{at}", "input": "What?", "output": f"answer {at}"}
            url = f"{served.url}/v1/users/{user}/interactions"
            if httpx.post(url, json={"interactions": [row]}, timeout=60).status_code == 200:
                acknowledged.append(user)
            time.sleep(0.1)

    asking, telling = USERS[8:20], USERS[20:22]
    expected_of = {user: expected(user, PROMPTS[0], 30) for user in asking}
    with ThreadPoolExecutor(len(asking) + len(telling)) as threads:
        work = [*(threads.submit(ask, user) for user in asking), *(threads.submit(tell, user) for user in telling)]
        try:
            until(lambda: len(statuses) > 20)
            before = set(served.each())
            os.kill(replica_processes()[0], signal.SIGKILL)
            killed_at = len(statuses)
            until(lambda: len(statuses) > killed_at + 16)
            until(lambda: len(served.each()) == 2 and set(served.each()) != before)
            again = len(statuses)
            until(lambda: len(statuses) > again + 16)
        finally:
            stop.set()
        for each in work:
            each.result()
    assert not wrong
    assert statuses.count(200) > 40, statuses
    for user in telling:
        found = httpx.get(f"{served.url}/v1/users/{user}", timeout=60).json()
        assert found["interactions"] >= acknowledged.count(user) > 0
    # Of a dead replica the counters stay, so that no rate becomes negative.
    assert served.stats().replicas == 2


def test_a_new_run_takes_the_place_of_the_former_one_without_a_pause(
    served: Served, expected: Callable[[str, str, int], str]
) -> None:
    newer = Path(shutil.copytree(served.link.resolve(), served.link.with_name("newer")))
    store = AdapterStore(RunFolder(newer).users.path)
    store.delete("u60")
    store.close()
    stop, statuses, asking = threading.Event(), list[int](), USERS[40:44]
    expected_of = {user: expected(user, PROMPTS[1], 8) for user in asking}

    def ask(user: str) -> None:
        while not stop.is_set():
            reply = served.complete(user, PROMPTS[1], 8)
            statuses.append(reply.status_code)
            assert reply.json()["choices"][0]["text"] == expected_of[user]

    with ThreadPoolExecutor(len(asking)) as threads:
        work = [threads.submit(ask, user) for user in asking]
        try:
            former = set(served.each())
            served.link.with_name("next").symlink_to("newer")
            served.link.with_name("next").replace(served.link)
            served.app.renew()
            assert not former & set(served.each()), "all replicas are new"
        finally:
            stop.set()
        for each in work:
            each.result()
    assert set(statuses) == {200}
    assert served.complete("u60", PROMPTS[1], 3).json()["proper"]["tier"] == "none"


def test_running_answers_are_finished_when_the_server_stops(
    served: Served, expected: Callable[[str, str, int], str]
) -> None:
    expected_of = {user: expected(user, PROMPTS[2], 150) for user in USERS[30:36]}

    def whole(user: str) -> str:
        return str(served.complete(user, PROMPTS[2], 150).json()["choices"][0]["text"])

    with ThreadPoolExecutor(6) as threads:
        answers = {user: threads.submit(whole, user) for user in expected_of}
        until(lambda: served.stats().running >= 4)
        served.server.should_exit = True
        assert {user: answer.result() for user, answer in answers.items()} == expected_of
    served.thread.join()
    with pytest.raises(httpx.ConnectError):
        served.complete("u1", PROMPTS[1], 2)


def until(found: Callable[[], object]) -> None:
    """Wait until `found()` is true."""
    deadline = time.monotonic() + 600
    while not found():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def replica_processes() -> list[int]:
    """The process ids of the replicas that this process started."""
    listed = subprocess.run(["pgrep", "-f", "ray::.*EngineReplica"], capture_output=True, text=True, check=False)
    return [pid for pid in map(int, listed.stdout.split()) if os.getpid() in ancestors(pid)]


def ancestors(pid: int) -> list[int]:
    """The parents of a process, up to the first one."""
    found = []
    while pid > 1:
        pid = int(Path(f"/proc/{pid}/stat").read_text(encoding="ascii", errors="replace").rpartition(")")[2].split()[1])
        found.append(pid)
    return found
