"""Hostile requests, seeded, against the whole application: no reply is a 500 and no line of the log a traceback.

Two sources: requests that the application's own OpenAPI document allows, broken here and there, and raw ones whose
methods, paths, headers and bodies are whatever an attacker may send.
"""

from __future__ import annotations

import json
import logging
import random
import shutil
import socket
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from tests.serving.conftest import Running, Serve

FEW, MANY = 400, 10_000
METHODS = ("GET", "POST", "HEAD", "DELETE", "PUT", "PATCH", "OPTIONS", "TRACE", "FOO")
TEXTS = (
    "", "x", " ", "\0", "\ud83d", "\udfff\ud800", "😀", "\u202e", "\r\nX: y", "%00", "../../etc/passwd", "u0", "u1",
    "tiny", "a" * 600, "word " * 300, "<script>", "{0}", "\\", '"', "é" * 40, "\uffff", "1e999", "NaN", "users",
    "auto", "system",
)  # fmt: skip
VALUES: tuple[Any, ...] = (
    None, True, False, 0, 1, -1, 2, 0.5, 1e308, float("nan"), float("inf"), 2**31, 2**63, -(2**63) - 1, 10**400, [], {},
    [None], [[]], [[[]]], {"a": {}}, {"": 1}, {"\ud800": "\udfff"}, [5, 8191], [8192], [-1], [[5], [6]],
)  # fmt: skip
KINDS = (
    "application/json", "application/json; charset=utf-16", "text/plain", "", "application/vnd.x+json",
    "multipart/form-data", "application/x-www-form-urlencoded", "application/json\t", "a" * 500,
)  # fmt: skip
HEADERS: dict[str, tuple[bytes, ...]] = {
    "Origin": (b"null", b"https://evil.example", b"\xff", b"http://[::1", b"http://127.0.0.1"),
    "Sec-Fetch-Site": (b"cross-site", b"same-origin", b"none", b"\xe9"),
    "Authorization": (b"Bearer", b"Bearer x", b"Basic \xff\xfe", b"Bearer " + b"x" * 5000, b"bearer \xc3\xa9"),
    "Host": (b"evil.example", b"127.0.0.1:99999", b"[::1]", b"[", b"localhost:x", b"@", b"\xff"),
    "Accept": (b"text/html", b"\xff"),
    "Content-Encoding": (b"gzip", b"br"),
    "Content-Length": (b"0", b"-1", b"99999999999", b"x"),
    "Transfer-Encoding": (b"chunked", b"gzip"),
    "Expect": (b"100-continue",),
    "Range": (b"bytes=0-1",),
    "X-Forwarded-For": (b"\xff",),
    "Upgrade": (b"websocket",),
}


class Fuzz:
    """Draws requests for one application's document."""

    def __init__(self, document: dict[str, Any], seed: int) -> None:
        self.schemas, self.draw = document["components"]["schemas"], random.Random(seed)
        self.operations = [
            (method.upper(), path, operation)
            for path, methods in sorted(document["paths"].items())
            for method, operation in sorted(methods.items())
        ]

    def value(self, schema: Any, depth: int = 0) -> Any:
        """Something that a schema allows, or in one of twelve cases anything."""
        draw = self.draw
        if draw.random() < 1 / 12 or depth > 6:
            return self.anything()
        if "$ref" in schema:
            return self.value(self.schemas[schema["$ref"].rpartition("/")[2]], depth)
        for choice in ("anyOf", "oneOf"):
            if choice in schema:
                return self.value(draw.choice(schema[choice]), depth)
        if "enum" in schema or "const" in schema:
            return draw.choice(schema.get("enum", [schema.get("const")]))
        kind = schema.get("type")
        if kind == "object":
            return self.fields(schema, depth)
        if kind == "array":
            return [self.value(schema.get("items", {}), depth + 1) for _ in range(draw.choice((0, 1, 1, 2, 3)))]
        if kind in ("integer", "number"):
            return draw.choice((0, 1, 2, 3, 5, schema.get("minimum", 1), schema.get("maximum", 9)))
        if kind == "boolean":
            return draw.random() < 0.5
        return draw.choice(TEXTS) if kind == "string" else None

    def fields(self, schema: Any, depth: int) -> dict[str, Any]:
        """An object; optional fields now and then, and one more where an attacker likes."""
        required, found = schema.get("required", []), {}
        for name, inner in schema.get("properties", {}).items():
            if name in required or self.draw.random() < 0.15:
                found[name] = self.value(inner, depth + 1)
        if "model" in found and self.draw.random() < 0.9:
            found |= {"model": "tiny", "max_tokens": self.draw.choice((1, 2, None))}
        if self.draw.random() < 0.05:
            found[self.draw.choice(TEXTS)] = self.anything()
        return found

    def anything(self) -> Any:
        """Whatever JSON has, and what Python's JSON has beyond it."""
        return self.draw.choice(VALUES) if self.draw.random() < 0.6 else self.draw.choice(TEXTS)

    def body(self, operation: Any) -> bytes:
        """A body for an operation, sometimes no JSON at all."""
        draw, known = self.draw, operation.get("requestBody", {}).get("content", {}).get("application/json")
        value = self.value(known["schema"]) if known and draw.random() < 0.9 else self.anything()
        text = json.dumps(value, ensure_ascii=draw.random() < 0.7)
        code = draw.choice(("utf-8",) * 8 + ("utf-16", "latin-1"))
        data = text.encode(code, "surrogatepass" if code != "latin-1" else "replace")
        if draw.random() < 0.1:
            at = draw.randrange(len(data) + 1)
            broken = (data[:at], data[:at] + bytes([draw.randrange(256)]) + data[at:], b"[" * 5000, data * 2, b"")
            data = draw.choice(broken)
        return data

    def request(self) -> tuple[str, bytes, list[tuple[bytes, bytes]], bytes]:
        """A method, a target as it goes over the wire, headers and a body."""
        draw = self.draw
        method, path, operation = draw.choice(self.operations)
        if draw.random() < 0.1:
            method = draw.choice(METHODS)
        for name in ("user", "name"):
            path = path.replace(f"{{{name}}}", self.escaped(draw.choice((*TEXTS, "u2", "u3", "tiny"))))
        query = "&".join(
            f"{draw.choice(('after', 'limit', 'tenant', 'x'))}={self.escaped(draw.choice(TEXTS))}"
            for _ in range(draw.choice((0, 0, 0, 1, 2)))
        )
        if draw.random() < 0.05:
            path = draw.choice(
                ("/", "//", "/page/..%2fx", "/v1/", "/%ff", "/v1/users/%ed%a0%80", "/openapi.json", "/*")
            )
        kind = "application/json" if draw.random() < 0.85 else draw.choice(KINDS)
        headers = [(b"Content-Type", kind.encode())]
        for name in draw.sample(sorted(HEADERS), draw.choice((0, 0, 0, 0, 1, 2))):
            headers.append((name.encode(), draw.choice(HEADERS[name])))
        body = b"" if method in ("GET", "HEAD") and draw.random() < 0.9 else self.body(operation)
        return method, (path + (f"?{query}" if query else "")).encode(), headers, body

    def escaped(self, text: str) -> str:
        """A text percent-encoded, its surrogates too."""
        return "".join(f"%{each:02x}" for each in text.encode("utf-8", "surrogatepass"))


def exchange(running: Running, method: str, target: bytes, headers: list[tuple[bytes, bytes]], body: bytes) -> bytes:
    """Send one request on a connection of its own, and return all that comes back."""
    given = {name for name, _ in headers}
    more = [(b"Host", b"localhost")] if b"Host" not in given else []
    framed = not given & {b"Content-Length", b"Transfer-Encoding", b"Upgrade", b"Expect"}
    more += [(b"Content-Length", str(len(body)).encode())] if framed else []
    lines = [method.encode() + b" " + target + b" HTTP/1.1", *(b": ".join(one) for one in [*more, *headers])]
    host, _, port = running.url.removeprefix("http://").partition(":")
    with socket.create_connection((host, int(port)), timeout=20) as connection:
        try:
            connection.sendall(b"\r\n".join([*lines, b"Connection: close", b"", b""]) + body)
            if not framed:
                connection.shutdown(socket.SHUT_WR)  # the server may wait for more than there is
            return b"".join(iter(lambda: connection.recv(1 << 16), b""))
        except ConnectionError:
            return b""  # refused before all was sent


@contextmanager
def complaints() -> Iterator[list[str]]:
    """What the server's libraries log, once it runs (it sets their handlers): a traceback is among it."""
    found: list[str] = []

    class Keep(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            found.append(logging.Formatter().format(record))

    keep, loggers = Keep(), [logging.getLogger(name) for name in ("uvicorn.error", "asyncio")]
    for one in loggers:
        one.addHandler(keep)
    try:
        yield found
    finally:
        for one in loggers:
            one.removeHandler(keep)


def judge(reply: bytes, method: str, folder: str, asked: str) -> int:
    """Check one reply, and return its status; 0 where the client had gone."""
    head, _, body = reply.removeprefix(b"HTTP/1.1 100 Continue\r\n\r\n").partition(b"\r\n\r\n")
    status = int(head.split(b" ")[1]) if head else 0
    assert status < 500, (asked, reply)
    assert b'data: {"error"' not in body, (asked, reply)
    assert folder.encode() not in reply, (asked, reply)
    if status >= 400 and method != "HEAD" and b"application/json" in head:
        assert set(json.loads(body)["error"]) == {"message", "type", "param", "code"}, (asked, reply)
    return status


@pytest.mark.parametrize("count", [FEW, pytest.param(MANY, marks=[pytest.mark.slow, pytest.mark.timeout(1200)])])
def test_no_request_is_a_failure_of_the_server(serve: Serve, tiny_run: Path, tmp_path: Path, count: int) -> None:
    running = serve(shutil.copytree(tiny_run, tmp_path / "tiny"), log_users=True)
    with running.client() as client:
        fuzz = Fuzz(client.get("/openapi.json").json(), seed=count)
    statuses: Counter[int] = Counter()
    with complaints() as found:
        for number in range(count):
            asked = fuzz.request()
            reply = exchange(running, *asked)
            statuses[judge(reply, asked[0], str(tmp_path), f"{number}: {asked}")] += 1
    assert not any("Traceback" in line for line in found), found
    assert all(line.isprintable() for line in running.log)
    assert running.engine.stats().errors == 0
    # It has to get through to be a test: each kind of answer came, and often.
    assert min(statuses[200] / count, statuses[400] / count) > 0.1, statuses
    rare = {409} if count == MANY else set()
    assert {403, 404, 405, 415} | rare <= set(statuses), statuses
    print(f"{count} requests: {dict(sorted(statuses.items()))}")
