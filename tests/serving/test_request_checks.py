"""What a page of another origin has a browser send is refused if it writes; HEAD is answered as GET is."""

from __future__ import annotations

import gzip
import shutil
import socket
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from playwright.sync_api import Browser

    from tests.serving.conftest import Running, Serve

JSON = {"Content-Type": "application/json"}
WRITES = (
    ("POST", "/v1/users", {"user": "ann", "interactions": []}),
    ("POST", "/v1/users/u0/interactions", {"interactions": []}),
    ("POST", "/v1/users/u0/rollback", None),
    ("POST", "/v1/completions", {"model": "tiny", "prompt": "x"}),
    ("POST", "/v1/chat/completions", {"model": "tiny", "messages": [{"role": "user", "content": "x"}]}),
    ("DELETE", "/v1/users/u0", None),
)


@pytest.fixture(scope="module")
def own(serve: Serve, tiny_run: Path, tmp_path_factory: pytest.TempPathFactory) -> Running:
    """A server whose store these tests may change; u0 has two versions."""
    from proper.adapters.store import AdapterStore

    folder = shutil.copytree(tiny_run, tmp_path_factory.mktemp("door") / "tiny")
    store = AdapterStore(folder / "users")
    record = store.get("u0")
    assert record is not None
    store.put([record])
    store.close()
    running: Running = serve(folder, log_users=True)
    return running


@pytest.mark.parametrize(("method", "path", "body"), WRITES, ids=lambda one: str(one)[:30])
@pytest.mark.parametrize(
    "sent",
    [
        {"Sec-Fetch-Site": "cross-site"},
        {"Sec-Fetch-Site": "same-site"},
        {"Origin": "https://evil.example"},
        {"Origin": "null"},
    ],
    ids=str,
)
def test_a_write_for_another_page_is_refused(own: Running, sent: Any, method: str, path: str, body: Any) -> None:
    with own.client() as client:
        before = client.get("/v1/users").json(), client.get("/v1/users/u0/versions").json()
        reply = client.request(method, path, json=body, headers=JSON | sent)
        assert (reply.status_code, reply.json()["error"]["code"]) == (403, "origin")
        assert (client.get("/v1/users").json(), client.get("/v1/users/u0/versions").json()) == before


def test_a_post_that_a_browser_would_send_for_any_page_is_refused(own: Running) -> None:
    simple = (None, "", "text/plain", "text/plain;application/json", "application/x-www-form-urlencoded")
    with own.client() as client:
        before = client.get("/v1/users/u0/versions").json()
        for path in (path for method, path, _ in WRITES if method == "POST"):
            for kind in simple:
                headers = {} if kind is None else {"Content-Type": kind}
                reply = client.post(path, content=b"" if "rollback" in path else b"{}", headers=headers)
                assert (reply.status_code, reply.json()["error"]["code"]) == (415, "content_type"), (path, kind)
        assert client.get("/v1/users/u0/versions").json() == before


def test_the_servers_own_pages_and_other_programs_may_write(own: Running) -> None:
    port = own.url.rpartition(":")[2]
    headers: list[dict[str, str]] = [
        JSON,
        JSON | {"Origin": own.url},
        JSON | {"Origin": "https://proxy.example", "Sec-Fetch-Site": "same-origin"},
        JSON | {"Sec-Fetch-Site": "none"},
        {"X-Requested-With": "curl"},
        {"Authorization": "Bearer x"},
        JSON | {"Host": f"LOCALHOST:{port}", "Origin": f"http://localhost:{port}"},
    ]
    with own.client() as client:
        for sent in headers:
            reply = client.post("/v1/users/u0/rollback", headers=sent)
            assert reply.status_code == 200, (sent, reply.text)


ALSO_MINE = ("127.0.0.1", "127.0.0.1:8000", "localhost", "LOCALHOST:1", "[::1]", "[::1]:8000")
NOT_MINE = (
    "",
    "evil.example",
    "127.0.0.1.evil.example",
    "127.0.0.1@evil.example",
    "evil.example@127.0.0.1",
    "evil.example#@127.0.0.1",
    "evil.example?@127.0.0.1:8000",
    "127.0.0.1/x",
    "127.0.0.1:8000@evil.example",
    "127.0.0.1:port",
    "::1",
)


def test_a_server_without_keys_is_asked_by_its_own_name_only(own: Running) -> None:
    """A name that a URL would have more in (a user, a path) is not this machine's, whichever part of it is."""
    with own.client() as client:
        answered = {host: client.get("/v1/users", headers={"Host": host}).status_code for host in ALSO_MINE + NOT_MINE}
    assert answered == dict.fromkeys(ALSO_MINE, 200) | dict.fromkeys(NOT_MINE, 403)


@pytest.mark.parametrize("hosts", ["", "Host: evil.example\r\nHost: 127.0.0.1\r\n"], ids=["none", "two"])
def test_one_host_must_be_named(own: Running, hosts: str) -> None:
    with socket.create_connection(("127.0.0.1", int(own.url.rpartition(":")[2])), timeout=10) as connection:
        connection.sendall(f"GET /v1/users HTTP/1.0\r\n{hosts}\r\n".encode())
        assert connection.makefile("rb").readline().split()[1] in (b"400", b"403")


PAGE = """<script>
const url = "%(url)s/v1/users/u1/rollback";
const tries = [{}, {headers: {"Content-Type": "text/plain"}}, {credentials: "include"}, {body: new URLSearchParams()}];
Promise.allSettled(tries.map((one) => fetch(url, {method: "POST", mode: "no-cors", ...one})))
  .then(() => Promise.allSettled([
    fetch(url, {method: "POST", headers: {"Content-Type": "application/json"}, body: "{}"}),
    fetch("%(url)s/v1/users/u1", {method: "DELETE"})]))
  .then(() => { navigator.sendBeacon(url); document.title = "sent"; });
</script><form method="post" action="%(url)s/v1/users/u1/rollback"><button>Send</button></form>"""


@pytest.fixture
def elsewhere(own: Running) -> Iterator[int]:
    """The port of another server of this machine, whose page does what it can."""

    class Page(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            body = (PAGE % {"url": own.url}).encode()
            self.send_response(200)
            self.send_header("Content-Type", "text/html")
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_: object) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Page) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield server.server_port
        server.shutdown()
        thread.join()


@pytest.mark.browser
@pytest.mark.parametrize("host", ["localhost", "127.0.0.1"])
def test_a_page_of_another_origin_in_a_browser(browser: Browser, own: Running, elsewhere: int, host: str) -> None:
    with own.client() as client:
        before = client.get("/v1/users/u1/versions").json()["data"]
        context = browser.new_context()
        page = context.new_page()
        sent = len(own.log)
        page.goto(f"http://{host}:{elsewhere}/")
        page.wait_for_function("document.title === 'sent'")
        with page.expect_navigation():
            page.get_by_role("button").click()
        assert "requests from a page of another origin are refused" in page.content()
        context.close()
        assert client.get("/v1/users/u1/versions").json()["data"] == before
    posts = [line for line in own.log[sent:] if line.startswith("POST ")]
    assert len(posts) >= 5 and all(" 403 " in line for line in posts), "the requests were sent, and refused"


READ = ("/", "/page/main.js", "/healthz", "/readyz", "/v1/models", "/v1/models/tiny", "/v1/users", "/v1/users/u0")


@pytest.mark.parametrize("path", [*READ, "/v1/users/u0/versions", "/metrics", "/openapi.json", "/v1/users/nobody"])
def test_head_is_get_without_a_body(own: Running, path: str) -> None:
    with own.client() as client:
        whole, head = client.get(path), client.head(path)
    assert (head.status_code, head.content) == (whole.status_code, b"")
    assert head.headers["content-type"] == whole.headers["content-type"]
    if path != "/metrics":  # its figures have other digits by then
        assert head.headers["content-length"] == whole.headers["content-length"]


@pytest.mark.parametrize(
    ("path", "allowed"),
    [
        ("/v1/users", "GET, HEAD, POST"),
        ("/v1/users/u0", "DELETE, GET, HEAD"),
        ("/v1/users/u0%2Fversions", "DELETE, GET, HEAD"),
        ("/v1/users/u0/versions", "GET, HEAD"),
        ("/v1/chat/completions", "POST"),
        ("/healthz", "GET, HEAD"),
    ],
)
def test_a_wrong_method_names_all_right_ones(own: Running, path: str, allowed: str) -> None:
    with own.client() as client:
        reply = client.put(path, json={})
    assert (reply.status_code, reply.headers["allow"]) == (405, allowed)


def test_head_on_one_connection_with_others(own: Running) -> None:
    host, _, port = own.url.removeprefix("http://").partition(":")
    ask = "{} /readyz HTTP/1.1\r\nHost: localhost\r\n{}\r\n"
    with socket.create_connection((host, int(port)), timeout=10) as connection:
        connection.sendall((ask.format("HEAD", "") + ask.format("GET", "Connection: close\r\n")).encode())
        read = b"".join(iter(lambda: connection.recv(1 << 16), b"")).decode()
    first, _, rest = read.partition("\r\n\r\n")
    assert first.startswith("HTTP/1.1 200 ") and rest.startswith("HTTP/1.1 200 ")
    assert rest.endswith('{"status":"ready","worker":"off"}')


def test_a_user_id_writes_no_line_into_the_log(own: Running) -> None:
    with own.client() as client:
        for user in ("x%0aGET /v1/users 200 1 ms", "x%0d%1b[2K", "x%E2%80%AEy%C2%85z"):
            client.get(f"/v1/users/{user}")
            client.post("/v1/users", json={"user": user, "interactions": []})
    for line in own.log:
        assert line.isprintable() and line.isascii(), ascii(line)
    assert any(line.startswith("GET /v1/users/x%0aGET%20/v1/users%20200%201%20ms 404 ") for line in own.log)


@pytest.mark.parametrize("path", ["/v1/completions", "/v1/users", "/v1/users/u0/rollback"])
@pytest.mark.parametrize("sent", [{"X-Requested-With": "curl"}, {"Authorization": "Bearer x"}], ids=str)
def test_a_body_that_is_not_declared_as_json_is_415(own: Running, path: str, sent: dict[str, str]) -> None:
    with own.client() as client:
        for kind in ({}, {"Content-Type": "application/x-www-form-urlencoded"}, {"Content-Type": "text/plain"}):
            reply = client.post(path, content=b'{"to": 1}', headers=sent | kind)
            assert (reply.status_code, reply.json()["error"]["code"]) == (415, "content_type"), kind
        packed = gzip.compress(b'{"to": 1}')
        reply = client.post(path, content=packed, headers=sent | JSON | {"Content-Encoding": "gzip"})
        assert (reply.status_code, reply.json()["error"]["code"]) == (415, "content_encoding")


@pytest.mark.parametrize(
    ("body", "said"),
    [
        (b'{"model": "tiny",', "body: not JSON: Expecting property name enclosed in double quotes at line 1"),
        ('{"prompt": "caf\u00e9"}'.encode("latin-1"), "body: not UTF-8 at byte 15"),
        (b"[" * 20_000, "body: nested too deeply"),
        (b"[" * 100_000, "body: nested too deeply"),
        (b'{"seed": ' + b"9" * 5000 + b"}", "body: a number is too long"),
    ],
    ids=["cut", "latin-1", "deep", "deep and large", "digits"],
)
def test_a_body_that_cannot_be_read_says_why(own: Running, body: bytes, said: str) -> None:
    with own.client() as client:
        error = client.post("/v1/completions", content=body, headers=JSON)
    assert error.status_code == 400 and error.json()["error"]["code"] == "invalid"
    assert error.json()["error"]["message"].startswith(said)


def test_a_path_with_a_slash_too_many_is_not_redirected(own: Running) -> None:
    """Behind a TLS proxy the redirect would lead to plain HTTP."""
    with own.client() as client:
        for reply in (client.get("/v1/models/"), client.post("/v1/chat/completions/", json={})):
            assert (reply.status_code, reply.json()["error"]["type"]) == (404, "not_found_error")
