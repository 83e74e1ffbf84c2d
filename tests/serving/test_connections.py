"""Connections that never finish a request, leave a reply unread, or are too many; and keep-alive."""

from __future__ import annotations

import contextlib
import http.client
import json
import resource
import socket
import time
from typing import TYPE_CHECKING

import pytest

from proper.serving import connections
from proper.serving.connections import ConnectionCounter, ConnectionLimits

if TYPE_CHECKING:
    from pathlib import Path

    from tests.serving.conftest import Running, Serve

SOON = 0.5
BUDGET = ConnectionLimits(
    total=12, per_address=10, header_seconds=SOON, body_seconds=SOON, unread_seconds=1.0, keep_alive_seconds=30
)
HEAD = b"POST /v1/completions HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Type: application/json\r\nContent-Length: 100\r\n"


@pytest.fixture(scope="module")
def strict(serve: Serve, long_run: Path) -> Running:
    running: Running = serve(long_run, rows=1, slots=1, connections=BUDGET)
    return running


def connect(running: Running) -> socket.socket:
    host, _, port = running.url.removeprefix("http://").partition(":")
    return socket.create_connection((host, int(port)), timeout=20)


def all_of(connection: socket.socket) -> bytes:
    """What comes until the server closes."""
    received = b""
    while piece := connection.recv(1 << 16):
        received += piece
    return received


@pytest.mark.parametrize(
    ("sent", "part"), [(b"", "header"), (HEAD, "header"), (HEAD + b'\r\n{"mo', "body")], ids=["idle", "header", "body"]
)
def test_a_request_that_never_ends_is_closed(strict: Running, sent: bytes, part: str) -> None:
    with connect(strict) as connection:
        begun = time.monotonic()
        connection.sendall(sent)
        said = all_of(connection)
        assert SOON * 0.9 < time.monotonic() - begun < 10
    assert said.startswith(b"HTTP/1.1 408 ") and f"the request's {part} did not come".encode() in said


@pytest.mark.parametrize("begin", [HEAD, HEAD + b"\r\n"], ids=["header", "body"])
def test_a_byte_now_and_then_does_not_move_the_deadline(strict: Running, begin: bytes) -> None:
    with connect(strict) as connection:
        begun = time.monotonic()
        connection.sendall(begin)
        connection.settimeout(SOON / 5)
        said = b""
        while not said:
            assert time.monotonic() - begun < 10
            connection.sendall(b"x")
            try:
                said = connection.recv(1 << 16)
            except TimeoutError:
                continue
    assert said.startswith(b"HTTP/1.1 408 ")


def test_the_second_request_of_a_connection_has_deadlines_too(strict: Running) -> None:
    with connect(strict) as connection:
        connection.sendall(b"GET /healthz HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n")
        assert connection.recv(1 << 16).startswith(b"HTTP/1.1 200 ")
        time.sleep(2 * SOON)  # nothing has begun: that is what keep-alive is for
        connection.sendall(b"GET /healthz HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\nGET /he")
        assert b" 200 OK" in (said := all_of(connection)) and b" 408 " in said


def test_keep_alive_outlasts_a_load_balancer(strict: Running) -> None:
    assert ConnectionLimits().keep_alive_seconds > 60
    client = http.client.HTTPConnection(strict.url.removeprefix("http://"), timeout=20)
    with contextlib.closing(client):
        client.request("GET", "/healthz")
        client.getresponse().read()
        kept = client.sock
        time.sleep(2 * SOON)
        client.request("GET", "/healthz")
        assert client.getresponse().read() and client.sock is kept


def test_keep_alive_ends(serve: Serve, long_run: Path) -> None:
    brief = serve(long_run, rows=1, slots=1, connections=ConnectionLimits(keep_alive_seconds=1))
    with connect(brief) as connection:
        connection.sendall(b"GET /healthz HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n")
        begun = time.monotonic()
        assert all_of(connection).startswith(b"HTTP/1.1 200 ")
        assert 0.8 < time.monotonic() - begun < 10


def test_too_many_connections_are_told_so(strict: Running) -> None:
    held = [connect(strict) for _ in range(BUDGET.per_address or 0)]
    time.sleep(0.1)
    with connect(strict) as one_more:
        said = all_of(one_more)
    assert said.startswith(b"HTTP/1.1 503 ") and b"this address has too many connections" in said
    for connection in held:
        connection.close()
    deadline = time.monotonic() + 10
    while True:
        with strict.client() as client:
            if client.get("/healthz").status_code == 200:
                break
        assert time.monotonic() < deadline


def test_a_reply_that_is_never_read_is_dropped(strict: Running) -> None:
    with socket.socket() as connection:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 2048)
        host, _, port = strict.url.removeprefix("http://").partition(":")
        connection.connect((host, int(port)))
        # As fast as the pipeline takes them: replies of 10 KB each.
        connection.setblocking(False)
        begun = time.monotonic()
        asked = b"GET /openapi.json HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n"
        while True:
            assert time.monotonic() - begun < 15, "the connection is still open"
            try:
                connection.send(asked)
            except BlockingIOError:
                time.sleep(0.01)
            except OSError:
                break


def test_the_store_keeps_its_descriptors(monkeypatch: pytest.MonkeyPatch) -> None:
    for soft, most in ((1024, 1024 - connections.RESERVED), (200, 40), (64, 8), (resource.RLIM_INFINITY, 4096)):
        monkeypatch.setattr(resource, "getrlimit", lambda _, soft=soft: (soft, soft))
        assert ConnectionLimits().most == most == ConnectionLimits(total=1 << 20).most
        assert ConnectionLimits().most_per_address == most // 2


def test_connections_are_counted_by_address_and_in_all() -> None:
    doors = ConnectionCounter(ConnectionLimits(total=3, per_address=2))
    assert [doors.enter(address) is None for address in "aaabb"] == [True, True, False, True, False]
    doors.leave("a")
    assert doors.enter("b") is None


@pytest.mark.parametrize("sent", [b"not http\r\n\r\n", HEAD + b"Content-Length: 7\r\n\r\n"], ids=["words", "lengths"])
def test_what_is_not_http_is_refused_in_the_form_of_other_errors(strict: Running, sent: bytes) -> None:
    with connect(strict) as connection:
        connection.sendall(sent)
        head, _, body = all_of(connection).partition(b"\r\n\r\n")
    assert head.startswith(b"HTTP/1.1 400 Bad Request\r\nContent-Type: application/json")
    assert json.loads(body)["error"] == {
        "message": "Invalid HTTP request received.",
        "type": "invalid_request_error",
        "param": None,
        "code": "http",
    }


def test_an_offer_of_another_protocol_is_answered_in_this_one(
    strict: Running, caplog: pytest.LogCaptureFixture
) -> None:
    """As curl's `--http2` and browsers' WebSockets send it; nothing is logged, as nothing is wrong."""
    body = b'{"model": "tiny", "prompt": "a", "max_tokens": 1}'
    for other in (b"h2c", b"websocket"):
        offer = b"Connection: Upgrade, HTTP2-Settings, close\r\nUpgrade: " + other + b"\r\nHTTP2-Settings: AAMAAABk\r\n"
        with connect(strict) as connection:
            connection.sendall(HEAD.replace(b"100", str(len(body)).encode()) + offer + b"\r\n" + body)
            assert all_of(connection).startswith(b"HTTP/1.1 200 ")
    assert not [record for record in caplog.records if record.name.startswith("uvicorn")]
