"""What one client sends, or a lock that another process holds, does not hold up the others; refused requests count."""

from __future__ import annotations

import json
import shutil
import socket
import sqlite3
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from typing import TYPE_CHECKING, Any

import pytest

from proper.serving.json_bodies import LARGE, MAX_VALUES
from proper.serving.limits import ServeLimits

if TYPE_CHECKING:
    from pathlib import Path

    from tests.serving.conftest import Running, Serve

ASK: dict[str, Any] = {"model": "tiny", "prompt": "What does this say?", "user": "u0", "max_tokens": 2}
PROMPT = {**ASK, "prompt": "a" * 1_000_000}
NUMBERS = {"model": "tiny", "messages": [{"role": "user", "content": [0] * 340_000}]}
KEYS = {**ASK, **{f"{number:x}": 0 for number in range(90_000)}}
BOUND = 1.0
"""Seconds that a reply may take beside others; a megabyte on the event loop took several."""


@pytest.fixture(scope="module")
def copied(serve: Serve, long_run: Path, tmp_path_factory: pytest.TempPathFactory) -> Running:
    running: Running = serve(shutil.copytree(long_run, tmp_path_factory.mktemp("loop") / "tiny"))
    return running


@contextmanager
def beside(*works: Callable[[], Any]) -> Iterator[list[threading.Thread]]:
    threads = [threading.Thread(target=work) for work in works]
    for thread in threads:
        thread.start()
    yield threads
    for thread in threads:
        thread.join()


@pytest.mark.parametrize(
    ("route", "body"),
    [("/v1/completions", PROMPT), ("/v1/chat/completions", NUMBERS), ("/v1/completions", KEYS)],
    ids=["prompt", "numbers", "keys"],
)
def test_large_bodies_hold_nobody_up(copied: Running, route: str, body: dict[str, Any]) -> None:
    data, replies, waits = json.dumps(body).encode(), [], []

    def send() -> None:
        with copied.client() as client:
            for _ in range(2):
                reply = client.post(route, content=data, headers={"Content-Type": "application/json"})
                replies.append((reply.status_code, len(reply.content) < 1000))

    with beside(send, send) as threads, copied.client() as client:
        while any(thread.is_alive() for thread in threads):
            begun = time.monotonic()
            assert client.get("/healthz").status_code == 200
            waits.append(time.monotonic() - begun)
    assert max(waits) < BOUND, waits
    assert len(data) < 1 << 20 and replies == [(400, True)] * 4


def test_a_body_of_many_valid_values_is_answered(copied: Running) -> None:
    parts = [{"type": "text", "text": ""}] * 20_000 + [{"type": "text", "text": "Well?"}]
    body = {"model": "tiny", "messages": [{"role": "user", "content": parts}], "max_tokens": 1}
    with copied.client() as client:
        reply = client.post("/v1/chat/completions", json=body)
        assert reply.status_code == 200, reply.text
        reply = client.post("/v1/completions", json={**ASK, "metadata": dict.fromkeys(map(str, range(50_000)), "")})
        assert reply.status_code == 200, reply.text
        reply = client.post("/v1/chat/completions", json=NUMBERS)
        assert f"more than {MAX_VALUES} values" in reply.json()["error"]["message"]


def test_a_lock_on_the_log_holds_up_writers_only(copied: Running) -> None:
    replies: list[int] = []

    def write(user: str) -> None:
        body = {"interactions": [{"input": "Well?", "output": "yes"}]}
        with copied.client() as client:
            replies.append(client.post(f"/v1/users/{user}/interactions", json=body).status_code)

    with copied.client() as client:
        assert client.post("/v1/users", json={"user": "z", "interactions": []}).status_code == 200
    log = sqlite3.connect(copied.folder / "users" / "interactions.sqlite", isolation_level=None)
    with closing(log):
        log.execute("BEGIN IMMEDIATE")
        with beside(lambda: write("z"), lambda: write("z"), lambda: write("u1")), copied.client() as client:
            time.sleep(0.3)  # the writers wait for the lock now
            begun = time.monotonic()
            assert client.get("/healthz").status_code == 200
            assert time.monotonic() - begun < BOUND
            assert client.post("/v1/completions", json=ASK).status_code == 200
            assert client.get("/metrics").status_code == 200
            assert not replies and time.monotonic() - begun < 10
            log.execute("COMMIT")
    assert replies == [200, 200, 200]


def test_a_lock_on_the_store_holds_up_writers_only(copied: Running) -> None:
    replies: list[int] = []

    def write(user: str) -> None:
        with copied.client() as client:
            headers = {"Content-Type": "application/json"}
            replies.append(client.post(f"/v1/users/{user}/rollback", content=b"{}", headers=headers).status_code)

    store = sqlite3.connect(copied.folder / "users" / "users.sqlite", isolation_level=None)
    with closing(store):
        store.execute("BEGIN IMMEDIATE")
        with beside(lambda: write("u2"), lambda: write("u3")), copied.client() as client:
            time.sleep(0.3)  # the writers wait for the lock now
            begun = time.monotonic()
            for user in ("u4", "u5", "u6", "u7"):
                assert client.get(f"/v1/users/{user}").status_code == 200
                assert client.post("/v1/completions", json={**ASK, "user": user}).status_code == 200
                health = time.monotonic()
                assert client.get("/healthz").status_code == 200
                assert time.monotonic() - health < BOUND
            assert not replies and time.monotonic() - begun < 10
            store.execute("COMMIT")
    assert replies == [409, 409], "these users have one version"


def test_a_database_that_does_not_answer_holds_readiness_up_only(
    copied: Running, monkeypatch: pytest.MonkeyPatch
) -> None:
    release, asked, replies = threading.Event(), threading.Event(), list[int]()
    read = copied.engine.model.store.manifest.metadata

    def late() -> dict[str, str]:
        asked.set()
        release.wait(20)
        return read()

    def ready() -> None:
        with copied.client() as client:
            replies.append(client.get("/readyz").status_code)

    monkeypatch.setattr(copied.engine.model.store.manifest, "metadata", late)
    with beside(ready), copied.client() as client:
        assert asked.wait(20)
        begun = time.monotonic()
        try:
            assert client.get("/healthz").status_code == 200
            assert time.monotonic() - begun < BOUND and not replies
        finally:
            release.set()
    assert replies == [200]


def test_a_body_is_not_waited_for_where_the_key_is_wrong(serve: Serve, long_run: Path, tmp_path: Path) -> None:
    running = serve(shutil.copytree(long_run, tmp_path / "tiny"), ServeLimits(per_minute=3), rows=1, slots=1)
    running.keys.add("", ["generate"])
    host, _, port = running.url.removeprefix("http://").partition(":")
    statuses = []
    for _ in range(5):
        with socket.create_connection((host, int(port)), timeout=20) as connection:
            head = f"POST /v1/completions HTTP/1.1\r\nHost: {host}\r\nContent-Length: 1000\r\n"
            connection.sendall(f"{head}Content-Type: application/json\r\nAuthorization: Bearer no\r\n\r\n{{".encode())
            statuses.append(connection.recv(1 << 16).split()[1])
    assert statuses == [b"401"] * 3 + [b"429"] * 2, "refused ones count for the address"
    with running.client() as client:
        assert client.get("/healthz").status_code == 200


def test_the_rate_counts_every_route_and_what_is_refused(serve: Serve, long_run: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(long_run, tmp_path / "tiny")
    asks: list[Callable[[Any], Any]] = [
        lambda client: client.post("/v1/completions", json=PROMPT),
        lambda client: client.post("/v1/users", json={"user": "new", "interactions": []}),
        lambda client: client.get("/v1/users"),
        lambda client: client.get("/v1/users/none/versions"),
        lambda client: client.post("/v1/users/none/rollback", json={}),
        lambda client: client.delete("/v1/users/none"),
        lambda client: client.post("/v1/completions", content=b"{"),
    ]
    running = serve(folder, ServeLimits(per_minute=len(asks)), rows=1, slots=1)
    with running.client() as client:
        assert 429 not in [ask(client).status_code for ask in asks]
        assert [ask(client).status_code for ask in asks] == [429] * len(asks)
        assert client.get("/healthz").status_code == 200


def test_every_route_is_open_or_counted(serve: Serve, long_run: Path) -> None:
    """Whoever adds a route that needs no key has to say so."""
    running = serve(long_run, ServeLimits(per_minute=1), rows=1, slots=1)
    with running.client() as client:
        paths: dict[str, Any] = client.get("/openapi.json").json()["paths"]
        assert client.get("/v1/models").status_code == 200
        for path, methods in paths.items():
            for method in methods:
                status = client.request(method, path.replace("{", "").replace("}", "")).status_code
                assert status == (200 if path in ("/healthz", "/readyz") else 429), path


BAD = "half \ud800 of one"
FILLED = [{"input": "x" * LARGE, "output": "y"}]


@pytest.mark.parametrize(
    ("route", "body", "place"),
    [
        ("/v1/completions", ASK | {"prompt": "x" * LARGE + BAD}, "prompt"),
        ("/v1/completions", ASK | {"prompt": "x" * LARGE, "user": BAD}, "user"),
        ("/v1/completions", ASK | {"prompt": "x" * LARGE, "metadata": {BAD: "1"}}, "metadata.half \\ud800 of one"),
        (
            "/v1/chat/completions",
            {"model": "tiny", "messages": [{"role": "user", "content": [{"type": "text", "text": "x" * LARGE + BAD}]}]},
            "messages.0.content.0.text",
        ),
        ("/v1/users", {"user": BAD, "interactions": FILLED}, "user"),
        (
            "/v1/users/u0/interactions",
            {"interactions": [*FILLED, {"input": BAD, "output": "y"}]},
            "interactions.1.input",
        ),
    ],
)
def test_half_a_character_in_a_large_body_is_refused_with_its_place(
    copied: Running, route: str, body: dict[str, Any], place: str
) -> None:
    data = json.dumps(body).encode()
    assert len(data) > LARGE
    with copied.client() as client:
        reply = client.post(route, content=data, headers={"Content-Type": "application/json"})
    assert (reply.status_code, reply.json()["error"]["param"]) == (400, place), reply.text
    assert "a lone surrogate" in reply.json()["error"]["message"]
