"""ASGI middleware that refuses cross-site request forgery (CSRF) and answers HEAD like GET.

A browser sends "simple" requests for any page that it shows, and names the origin of the page in `Sec-Fetch-Site`, or
in `Origin` where that is missing. A request that writes is refused if its page has another origin, and if it is simple:
an old browser that sends neither header cannot forge it either.
"""

from __future__ import annotations

from collections.abc import Mapping

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from proper.serving.errors import APIError
from proper.serving.middleware import reply

_READS = ("GET", "HEAD", "OPTIONS")


class RequestChecks:
    """ASGI middleware that refuses forged requests and answers HEAD."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one request."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        refusal = forged(scope["method"], Headers(scope=scope))
        if refusal is not None:
            await reply(refusal)(scope, receive, send)
        elif scope["method"] == "HEAD":
            await self._head(scope, receive, send)
        else:
            await self.app(scope, receive, send)

    async def _head(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer HEAD with the headers of GET and no body."""

        async def bodiless(message: Message) -> None:
            await send({**message, "body": b""} if message["type"] == "http.response.body" else message)

        # A copy: uvicorn reads HEAD from its own scope and so accepts a Content-Length without a body.
        asked = {**scope, "method": "GET"}
        try:
            await self.app(asked, receive, bodiless)
        finally:
            if "route" in asked:
                scope["route"] = asked["route"]


def forged(method: str, headers: Mapping[str, str]) -> APIError | None:
    """Return the error for a request that writes and may come from a page of another origin; None if it cannot."""
    if method in _READS:
        return None
    site, origin = headers.get("sec-fetch-site"), headers.get("origin")
    # The browser sets Sec-Fetch-Site itself, so it is right even behind a proxy that renames the server.
    foreign = site not in ("same-origin", "none") if site is not None else origin not in (None, *_own(headers))
    if foreign:
        return APIError(403, "a page of another origin may not ask for this", code="origin")
    if method == "POST" and not _json(headers.get("content-type", "")) and not _not_simple(headers):
        return APIError(415, "a POST needs the header Content-Type: application/json", code="content_type")
    return None


def _own(headers: Mapping[str, str]) -> list[str]:
    """Return the origins of the server's own pages, under the name in the request's Host header."""
    host = headers.get("host", "").lower()
    return [f"http://{host}", f"https://{host}"]


def _json(kind: str) -> bool:
    kind = kind.partition(";")[0].strip().lower()
    return kind == "application/json" or (kind.startswith("application/") and kind.endswith("+json"))


def _not_simple(headers: Mapping[str, str]) -> bool:
    """Return whether a browser would have sent a CORS preflight first, which this server never grants."""
    return "authorization" in headers or "x-requested-with" in headers
