"""What is refused, and how; what leaves early frees its row; what is written to the log."""

from __future__ import annotations

import asyncio
import json
import socket
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import pytest

from proper.serving.generation import unless_gone
from proper.serving.limits import ServeLimits, Turnstile
from proper.serving.refusals import Refusal

if TYPE_CHECKING:
    from pathlib import Path

    Running = Serve = Any  # tests/serving/conftest.py

ASK: dict[str, Any] = {"model": "tiny", "prompt": "What does this say?", "user": "u0"}


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
        ({"top_p": 0}, 400, "top_p: "),
        ({"n": 2}, 400, "n: "),
        ({"logprobs": 3}, 400, "logprobs: "),
        ({"frequency_penalty": 0.5}, 400, "frequency_penalty: "),
        ({"promt": "x"}, 400, "promt: "),
        ({"user": ""}, 400, "user: "),
        ({"prompt": ["x"] * 65}, 400, "prompt"),
        ({"prompt": "x" * 2000}, 413, "larger than 2000 bytes"),
        ({"prompt": ["a", "b", "c"]}, 429, "may have 2 prompts open at once"),
        ({"prompt": ["a", "b", "c", "d"]}, 429, "the server is full"),
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
        assert client.post("/v1/completions", content=b"{").status_code == 400
        assert client.post("/v1/completions", content=(b"x" * 500 for _ in range(9))).status_code == 413
        assert client.get("/v1/nothing").json()["error"]["type"] == "not_found_error"
        assert client.get("/v1/completions").status_code == 405


def sent(running: Running, body: dict[str, Any]) -> socket.socket:
    """Send a request and return the connection, nothing read from it."""
    host, _, port = running.url.removeprefix("http://").partition(":")
    data = json.dumps(body).encode()
    head = f"POST /v1/completions HTTP/1.1\r\nHost: {host}\r\nContent-Type: application/json\r\n"
    connection = socket.create_connection((host, int(port)), timeout=60)
    connection.sendall(f"{head}Content-Length: {len(data)}\r\n\r\n".encode() + data)
    return connection


@pytest.mark.parametrize("stream", [True, False])
def test_whoever_goes_away_frees_the_row(small: Running, stream: bool) -> None:
    def ended(reason: str = "") -> float:
        figures = small.figures().items()
        return sum(count for name, count in figures if name.startswith("proper_requests_total{") and reason in name)

    def leave_early() -> bool:
        """Go away while the answer is made; it may be ready before that is noticed."""
        before, cancelled = ended(), ended("cancelled")
        with sent(small, {**ASK, "stream": stream, "max_tokens": 230}) as connection:
            if stream:
                assert connection.recv(64)
            else:
                until(lambda: small.engine.stats().running == 1 or ended() > before)
        until(lambda: ended() > before)
        return ended("cancelled") > cancelled

    assert any(leave_early() for _ in range(20))
    until(lambda: small.engine.stats().running == 0)
    with small.client() as client:
        assert client.post("/v1/completions", json=ASK).status_code == 200


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

    with pytest.raises(Refusal, match="the client has gone"):
        asyncio.run(unless_gone(receive, busy()))
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
    assert any(line.startswith("GET /v1/users/{user} 200 ") for line in small.log)
    assert not any("u3" in line or ASK["prompt"] in line for line in small.log)
    asked = serve(long_run, log_users=True)
    with asked.client() as client:
        client.get("/v1/users/u3")
    assert any(line.startswith("GET /v1/users/u3 200 ") for line in asked.log)


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


def test_a_rate_fills_up_again() -> None:
    now = [0.0]
    turnstile = Turnstile(ServeLimits(per_minute=2), lambda: now[0])

    def ask(key: str) -> None:
        with turnstile.enter(key, 1):
            pass

    for key in ("a", "a", "b"):
        ask(key)
    with pytest.raises(Refusal, match="2 times a minute") as refused:
        ask("a")
    assert refused.value.headers == {"Retry-After": "31"}
    now[0] = 31
    ask("a")
