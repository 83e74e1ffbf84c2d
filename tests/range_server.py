"""A web server that can resume a download, and misbehave on request."""

from __future__ import annotations

import hashlib
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path


@dataclass
class Site:
    """What is served, how, and what was asked for.

    `break_after` ends each answer after so many bytes; `ranges` and `tags` switch off what old servers lack; `page` is
    sent with status 200 for whatever is not there.
    """

    folder: Path
    url: str = ""
    break_after: int | None = None
    ranges: bool = True
    tags: bool = True
    page: bytes | None = None
    asked: list[tuple[str, str | None, int]] = field(default_factory=list)


class _Handler(BaseHTTPRequestHandler):
    site: Site

    def do_GET(self) -> None:
        path, wanted = self.site.folder / self.path.lstrip("/"), self.headers.get("Range")
        if not path.is_file():
            status, body = (200, self.site.page) if self.site.page is not None else (404, b"not here")
            return self._send(status, body, wanted)
        whole = path.read_bytes()
        tag = f'"{hashlib.sha256(whole).hexdigest()[:16]}"' if self.site.tags else None
        same = self.headers.get("If-Range") in (None, tag)
        if wanted and self.site.ranges and same:
            start = int(re.fullmatch(r"bytes=(\d+)-", wanted)[1])  # type: ignore[index]
            if start >= len(whole):
                return self._send(416, b"", wanted, {"Content-Range": f"bytes */{len(whole)}"})
            headers = {"Content-Range": f"bytes {start}-{len(whole) - 1}/{len(whole)}"}
            return self._send(206, whole[start:], wanted, headers | ({"ETag": tag} if tag else {}))
        return self._send(200, whole, wanted, {"ETag": tag} if tag else {})

    def _send(self, status: int, body: bytes, wanted: str | None, headers: dict[str, str] | None = None) -> None:
        self.site.asked.append((self.path, wanted, status))
        self.send_response(status)
        for name, value in {"Content-Length": str(len(body)), **(headers or {})}.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(body if self.site.break_after is None else body[: self.site.break_after])
        self.close_connection = True

    def log_message(self, format: str, *args: object) -> None:
        """Say nothing."""


@contextmanager
def serve(folder: Path) -> Iterator[Site]:
    site = Site(folder)
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (_Handler,), {"site": site}))
    site.url = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
    thread.start()
    try:
        yield site
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
