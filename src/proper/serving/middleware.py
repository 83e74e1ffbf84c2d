"""ASGI middleware for every request: body size limit, access log line, reply counter.

The log line names the route's pattern, not the path: user ids stay out of logs unless `log_users` is set.
"""

from __future__ import annotations

import time
from collections.abc import Callable

from fastapi import HTTPException
from fastapi.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from proper.serving.errors import APIError
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

        async def noting(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        try:
            await self._limited(scope, receive, noting)
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
    return APIError(413, f"the body is larger than {limit} bytes", code="too_large", headers={"Connection": "close"})


def reply(refusal: APIError) -> JSONResponse:
    """Return an error as a response."""
    return JSONResponse(refusal.body(), refusal.status, headers=refusal.headers)
