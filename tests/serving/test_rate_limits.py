"""What is refused, and how; what leaves early frees its row; what is written to the log."""

from __future__ import annotations

import asyncio
import json
import shutil
import socket
import sqlite3
import time
from collections.abc import Callable
from contextlib import closing
from typing import TYPE_CHECKING, Any

import pytest
import yaml

from proper.serving import limits
from proper.serving.errors import APIError, hide_users
from proper.serving.limits import RateLimiter, ServeLimits
from proper.serving.routes.generation import cancel_on_disconnect

if TYPE_CHECKING:
    from pathlib import Path

    from tests.serving.conftest import Running, Serve

ASK: dict[str, Any] = {"model": "tiny", "prompt": "What does this say?", "user": "u0"}
LONGEST = 4000
"""Tokens of an answer that nobody waits for: many seconds of the tiny model."""


@pytest.fixture(scope="module")
def small(serve: Serve, long_run: Path) -> Running:
    running: Running = serve(long_run, ServeLimits(body_bytes=2000, open_requests=3, open_per_key=2), rows=1, slots=1)
    return running


@pytest.mark.parametrize(
    ("change", "status", "said"),
    [
        ({"prompt": " \n"}, 400, "the prompt is empty"),
        ({"prompt": "word " * 300}, 400, "answer (up to 6) are longer than the 250 that fit"),
        ({"max_tokens": 250}, 400, "are longer than the 250 that fit"),
        ({"max_tokens": 0}, 400, "max_tokens: "),
        ({"temperature": -1}, 400, "temperature: "),
        ({"top_p": -0.1}, 400, "top_p: "),
        ({"n": 2}, 400, "n: "),
        ({"logprobs": 6}, 400, "logprobs: "),
        ({"frequency_penalty": 0.5}, 400, "frequency_penalty: "),
        ({"promt": "x"}, 400, "promt: "),
        ({"user": ""}, 400, "user: "),
        ({"prompt": ["x"] * 65}, 400, "prompt: should be at most 64 prompts"),
        ({"prompt": "x" * 2000}, 413, "larger than 2000 bytes"),
        ({"prompt": ["a", "b", "c"]}, 429, "may have 2 prompts open at once"),
        ({"prompt": ["a", "b", "c", "d"]}, 429, "too many prompts are open"),
    ],
)
def test_refused_in_one_line(small: Running, change: dict[str, Any], status: int, said: str) -> None:
    with small.client() as client:
        reply = client.post("/v1/completions", json={**ASK, **change})
        assert reply.status_code == status, reply.text
        error = reply.json()["error"]
        assert said in error["message"] and "\n" not in error["message"]
        assert status != 429 or int(reply.headers["retry-after"]) >= 1
        assert client.post("/v1/completions", json=ASK).status_code == 200, "the next one is served"


def test_bodies_that_are_no_json_or_come_in_pieces(small: Running) -> None:
    with small.client() as client:
        client.headers["Content-Type"] = "application/json"
        assert client.post("/v1/completions", content=b"{").status_code == 400
        assert client.post("/v1/completions", content=(b"x" * 500 for _ in range(9))).status_code == 413
        assert client.get("/v1/nothing").json()["error"]["type"] == "not_found_error"
        assert client.get("/v1/completions").status_code == 405


def test_a_body_that_is_far_too_large_is_told_so(small: Running) -> None:
    """The client sends more than the buffers between them hold, and reads after that."""
    with small.client() as client:
        reply = client.post("/v1/completions", json={**ASK, "prompt": "x" * (16 << 20)})
        assert (reply.status_code, reply.json()["error"]["code"]) == (413, "too_large")
        assert client.post("/v1/completions", json=ASK).status_code == 200


def sent(running: Running, body: dict[str, Any]) -> socket.socket:
    """Send a request and return the connection, nothing read from it."""
    host, _, port = running.url.removeprefix("http://").partition(":")
    data = json.dumps(body).encode()
    head = f"POST /v1/completions HTTP/1.1\r\nHost: {host}\r\nContent-Type: application/json\r\n"
    connection = socket.create_connection((host, int(port)), timeout=60)
    connection.sendall(f"{head}Content-Length: {len(data)}\r\n\r\n".encode() + data)
    return connection


@pytest.fixture(scope="module")
def endless(serve: Serve, long_run: Path, tmp_path_factory: pytest.TempPathFactory) -> Running:
    """A server of one row, whose answers take far longer than it may take to notice that a client disconnected."""
    folder = shutil.copytree(long_run, tmp_path_factory.mktemp("endless") / "tiny")
    raw = yaml.safe_load((folder / "config.yaml").read_text(encoding="utf-8"))
    raw["compute"]["max_length"] = LONGEST + 50
    (folder / "config.yaml").write_text(yaml.safe_dump(raw), encoding="utf-8")
    running: Running = serve(folder, rows=1, slots=1)
    return running


def ends(running: Running) -> dict[str, float]:
    """How many requests have ended so far, by tier and reason."""
    figures = running.figures().items()
    return {name.partition("{")[2]: count for name, count in figures if name.startswith("proper_requests_total{")}


@pytest.mark.parametrize("stream", [True, False])
def test_whoever_goes_away_frees_the_row(endless: Running, stream: bool) -> None:
    before = ends(endless)
    with sent(endless, {**ASK, "stream": stream, "max_tokens": LONGEST}) as connection:
        if stream:
            # Not at the first bytes: the head of the reply is sent before the request has a row.
            while b"data: " not in connection.recv(4096):
                pass
        until(lambda: endless.engine.stats().running == 1)
    until(lambda: endless.engine.idle)
    cancelled = 'reason="cancelled",tier="users"}'
    assert ends(endless) == {**before, cancelled: before.get(cancelled, 0) + 1}
    assert endless.engine.stats().running == 0
    with endless.client() as client:
        assert client.post("/v1/completions", json=ASK).status_code == 200


def test_whoever_goes_away_in_the_line_never_gets_a_row(endless: Running) -> None:
    before = ends(endless)
    with sent(endless, {**ASK, "stream": True, "max_tokens": LONGEST}) as first:
        until(lambda: endless.engine.stats().running == 1)
        with sent(endless, {**ASK, "stream": True, "max_tokens": LONGEST, "user": "u1"}) as second:
            assert second.recv(64).startswith(b"HTTP/1.1 200"), "the head comes while the request waits"
            until(lambda: endless.engine.stats().waiting == 1)
        until(lambda: endless.engine.stats().waiting == 0)
        nobodys = 'reason="cancelled",tier="none"}'
        until(lambda: ends(endless) == {**before, nobodys: before.get(nobodys, 0) + 1})
        assert first.recv(64).startswith(b"HTTP/1.1 200") and endless.engine.stats().running == 1
    until(lambda: endless.engine.idle)


def test_going_away_is_noticed_while_nothing_is_sent() -> None:
    left: list[str] = []

    async def busy() -> None:
        try:
            await asyncio.sleep(3600)
        finally:
            left.append("row")

    async def receive() -> dict[str, str]:
        await asyncio.sleep(0)
        return {"type": "http.disconnect"}

    with pytest.raises(APIError, match="the client disconnected"):
        asyncio.run(cancel_on_disconnect(receive, busy()))
    assert left == ["row"]


def until(happened: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 60
    while not happened():
        assert time.monotonic() < deadline
        time.sleep(0.001)


def test_prompts_and_users_stay_out_of_the_log(serve: Serve, long_run: Path, small: Running) -> None:
    with small.client() as client:
        client.get("/v1/users/u3")
        client.post("/v1/completions", json={**ASK, "user": "u3"})
        client.post("/v1/completions", json={**ASK, "temperature": "u3"})
    # A line is written after the last byte of its reply.
    until(lambda: any(line.startswith("GET /v1/users/{user} 200 ") for line in small.log))
    until(lambda: small.log[-1].startswith("POST /v1/completions 400 "))
    assert not any("u3" in line or ASK["prompt"] in line for line in small.log)
    asked = serve(long_run, log_users=True)
    with asked.client() as client:
        client.get("/v1/users/u3")
    until(lambda: any(line.startswith("GET /v1/users/u3 200 ") for line in asked.log))


def test_refusals_and_failures_keep_users_and_texts_out_of_the_log(
    serve: Serve, tiny_run: Path, tmp_path: Path
) -> None:
    """The reply says it to the client; an error that the operator must see is logged without the user's id."""
    folder = shutil.copytree(tiny_run, tmp_path / "tiny")
    running = serve(folder)
    lesson = [{"id": "1", "input": "a secret", "output": "x"}]
    told = {
        404: ("GET", "/v1/users/mary o'neil", None),
        409: ("POST", "/v1/users", {"user": "u3", "interactions": []}),
        400: ("POST", "/v1/completions", {**ASK, "model": "tiny", "prompt": [9_999_999], "user": "u3"}),
    }
    with running.client() as client:
        for status, (method, path, body) in told.items():
            assert client.request(method, path, json=body).status_code == status
        client.post("/v1/users", json={"user": "ann", "interactions": lesson})
        changed = [{**lesson[0], "output": "mary's other secret"}]
        assert client.post("/v1/users/ann/interactions", json={"interactions": changed}).status_code == 409
        with closing(sqlite3.connect(folder / "users/users.sqlite")) as store, store:
            store.execute("UPDATE records SET tier = 'astray' WHERE user = ?", (b"u3",))
        assert client.get("/v1/users/u3/versions").status_code == 500
    until(lambda: running.log[-1].startswith("GET /v1/users/{user}/versions 500 "))
    assert any(line.startswith("StoreError: user (hidden): unknown tier 'astray'") for line in running.log), running.log
    found = [line for line in running.log for one in ("u3", "mary", "ann", "secret", "9999999") if one in line]
    assert not found


@pytest.mark.parametrize("user", ["u3", "o'neil", """'"' \\'""", "a\nuser 'b'", "", "x'"])
def test_the_user_of_a_message_is_hidden(user: str) -> None:
    assert hide_users(f"a/b: the adapter of user {user!r}: 'x'") == "a/b: the adapter of user (hidden): 'x'"


def test_a_page_from_elsewhere_is_not_this_machine(small: Running) -> None:
    with small.client() as client:
        reply = client.get("/v1/models", headers={"Host": "evil.example:8000"})
        assert (reply.status_code, reply.json()["error"]["code"]) == (403, "host")


def test_health_and_figures(small: Running) -> None:
    with small.client() as client:
        assert client.get("/healthz").json() == {"status": "ok", "worker": "off"}
        assert client.get("/readyz").json() == {"status": "ready", "worker": "off"}
        client.post("/v1/completions", json={**ASK, "max_tokens": 3})
    figures = small.figures()
    assert figures["proper_slots"] == 1 and figures["proper_slots_resident"] == 1
    assert figures['proper_new_tokens_total{tier="users"}'] >= 3
    assert figures['proper_first_token_seconds_count{tier="users"}'] >= 1
    assert figures['proper_http_replies_total{route="/v1/completions",status="200"}'] >= 1
    assert not any("u0" in name for name in figures)


def test_what_is_kept_of_keys_does_not_grow_with_those_who_have_left(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limits, "_BUCKETS", 10)
    now = [0.0]
    limiter = RateLimiter(ServeLimits(per_minute=2), lambda: now[0])
    for minute in range(5):
        now[0] = 61.0 * minute
        for number in range(100):
            with limiter.visit(f"{minute} {number}"), limiter.enter(f"{minute} {number}", 1):
                pass
        assert len(limiter._buckets) <= 2 * 100 + 1
    with pytest.raises(APIError, match="2 requests a minute"):
        for _ in range(3):
            limiter.count("4 99")
    assert not limiter._open_prompts and not limiter._open_requests


def test_a_rate_fills_up_again() -> None:
    now = [0.0]
    limiter = RateLimiter(ServeLimits(per_minute=2), lambda: now[0])

    def ask(key: str) -> None:
        with limiter.visit(key):
            pass

    for key in ("a", "a", "b"):
        ask(key)
    with pytest.raises(APIError, match="2 requests a minute") as refused:
        ask("a")
    assert refused.value.headers == {"Retry-After": "31"}
    now[0] = 31
    ask("a")
