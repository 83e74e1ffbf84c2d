"""ASGI middleware, outermost first: request log and body limit, admission (authentication and rate), request checks.

The log line names the route's pattern, not the path: user ids stay out of logs unless `log_users` is set. Admission
runs before the request body is read. The request checks refuse cross-site request forgery (CSRF) and answer HEAD.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Mapping
from contextlib import ExitStack

from fastapi import HTTPException, Request
from fastapi.responses import JSONResponse
from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from proper.errors import ProperError
from proper.serving.auth import Authenticator
from proper.serving.errors import APIError
from proper.serving.json_bodies import is_json
from proper.serving.limits import RateLimiter
from proper.serving.metrics import Metrics


class RequestMiddleware:
    """ASGI middleware that limits bodies, logs requests and counts replies.

    Args:
        app: the wrapped application.
        body_bytes: size of the largest body.
        metrics: where replies are counted.
        log: called with each log line.
        log_users: whether log lines may contain paths, and so user ids.
    """

    def __init__(
        self, app: ASGIApp, *, body_bytes: int, metrics: Metrics, log: Callable[[str], None], log_users: bool
    ) -> None:
        self.app, self.body_bytes, self.metrics, self.log, self.log_users = app, body_bytes, metrics, log, log_users

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one request."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        begun, status = time.monotonic(), 499

        async def record_status(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        try:
            await self._limited(scope, receive, record_status)
        except Exception:
            status = 500  # the outer application replies with 500
            raise
        finally:
            route = getattr(scope.get("route"), "path", "-")
            self.metrics.replies.labels(route, str(status)).inc()
            # The path stays percent-encoded, so that no user id can look like a line or a field of the log.
            shown = scope["raw_path"].decode("ascii", "backslashreplace") if self.log_users else route
            self.log(f"{scope['method']} {shown} {status} {1000 * (time.monotonic() - begun):.0f} ms")

    async def _limited(self, scope: Scope, receive: Receive, send: Send) -> None:
        announced = dict(scope["headers"]).get(b"content-length", b"0")
        read = 0

        async def counting() -> Message:
            nonlocal read
            message = await receive()
            read += len(message.get("body", b""))
            if read > self.body_bytes:
                raise HTTPException(413, _too_large(self.body_bytes).message)  # FastAPI makes others a 400
            return message

        if announced.isdigit() and int(announced) > self.body_bytes:
            await reply(_too_large(self.body_bytes))(scope, receive, send)
            return
        await self.app(scope, counting, send)


def _too_large(limit: int) -> APIError:
    # Without "Connection: close", the rest of the body is read and dropped, for at most the time that a body may take.
    # A connection that is closed before is reset, and the client does not get to read why.
    return APIError(413, f"the body is larger than {limit} bytes", code="too_large")


def reply(refusal: APIError) -> JSONResponse:
    """Return an error as a response."""
    return JSONResponse(refusal.body(), refusal.status, headers=refusal.headers)


_READS = ("GET", "HEAD", "OPTIONS")


class RequestChecksMiddleware:
    """ASGI middleware that refuses cross-origin requests that write, and answers HEAD.

    A browser sends "simple" requests for any page that it shows, and names the origin of the page in `Sec-Fetch-Site`,
    or in `Origin` where that is missing. A request that writes is refused if its page has another origin, and if it is
    simple: an old browser that sends neither header cannot forge it either.
    """

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one request."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        refusal = cross_origin_error(scope["method"], Headers(scope=scope))
        if refusal is not None:
            await reply(refusal)(scope, receive, send)
        elif scope["method"] == "HEAD":
            await self._head(scope, receive, send)
        else:
            await self.app(scope, receive, send)

    async def _head(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer HEAD with the headers of GET and no body."""

        async def without_body(message: Message) -> None:
            await send({**message, "body": b""} if message["type"] == "http.response.body" else message)

        # A copy: uvicorn reads HEAD from its own scope and so accepts a Content-Length without a body.
        get_scope = {**scope, "method": "GET"}
        try:
            await self.app(get_scope, receive, without_body)
        finally:
            if "route" in get_scope:
                scope["route"] = get_scope["route"]


def cross_origin_error(method: str, headers: Mapping[str, str]) -> APIError | None:
    """Return the error for a request that writes and may come from a page of another origin; None if it cannot."""
    if method in _READS:
        return None
    site, origin = headers.get("sec-fetch-site"), headers.get("origin")
    # The browser sets Sec-Fetch-Site itself, so it is right even behind a proxy that renames the server.
    foreign = site not in ("same-origin", "none") if site is not None else origin not in (None, *_own(headers))
    if foreign:
        return APIError(403, "requests from a page of another origin are refused", code="origin")
    if method == "POST" and not is_json(headers.get("content-type", "")) and not _needs_preflight(headers):
        return APIError(415, "a POST needs the header Content-Type: application/json", code="content_type")
    return None


def _own(headers: Mapping[str, str]) -> list[str]:
    """Return the origins of the server's own pages, under the name in the request's Host header."""
    host = headers.get("host", "").lower()
    return [f"http://{host}", f"https://{host}"]


def _needs_preflight(headers: Mapping[str, str]) -> bool:
    """Return whether a browser would have sent a CORS preflight first, which this server never grants."""
    return "authorization" in headers or "x-requested-with" in headers


PUBLIC_PATHS = ("/", "/healthz", "/readyz", "/openapi.json")
"""Paths that need no key; paths below /page/ need none either."""


class AdmissionMiddleware:
    """ASGI middleware that authenticates a request and applies the rate limits.

    A refused request counts towards the key's rate like any other; a request without a valid key counts towards the
    rate of its address.
    """

    def __init__(self, app: ASGIApp, *, auth: Authenticator, limiter: RateLimiter) -> None:
        self.app, self.auth, self.limiter = app, auth, limiter

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one request."""
        if scope["type"] != "http" or scope["path"] in PUBLIC_PATHS or scope["path"].startswith("/page/"):
            await self.app(scope, receive, send)
            return
        with ExitStack() as stack:
            try:
                await self._enter(scope, stack)
            except APIError as refusal:
                await JSONResponse(refusal.body(), refusal.status, headers=refusal.headers)(scope, receive, send)
                return
            await self.app(scope, receive, send)

    async def _enter(self, scope: Scope, stack: ExitStack) -> None:
        try:
            principal = await asyncio.to_thread(self.auth.principal, Request(scope))  # may read the key file
        except APIError:
            self.limiter.count(f"address {(scope.get('client') or ('',))[0]}")
            raise
        except ProperError as error:
            raise APIError(500, "the server's keys cannot be read", code="keys") from error
        stack.enter_context(self.limiter.visit(principal.id))
        scope.setdefault("state", {})["principal"] = principal
