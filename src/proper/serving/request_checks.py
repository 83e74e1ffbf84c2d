"""Before any route: HEAD is answered as GET, and what a page of another origin may have made a browser send is refused.

A browser sends some requests for any page that it shows ("simple" ones) and says which page asked: `Sec-Fetch-Site`,
or `Origin` where that is missing. A request that writes is refused if the page is another's, and if it could be simple:
so an old browser that says nothing cannot send it either. Knows nothing about keys or what routes do.
"""

from __future__ import annotations

from collections.abc import Mapping

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from proper.serving.errors import APIError
from proper.serving.middleware import reply

_READS = ("GET", "HEAD", "OPTIONS")


class RequestChecks:
    """Wraps an ASGI application."""

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
        """Answer as GET does, without the body."""

        async def bodiless(message: Message) -> None:
            await send({**message, "body": b""} if message["type"] == "http.response.body" else message)

        # A copy: the server knows by its own that this is HEAD, and that Content-Length may be what it is.
        asked = {**scope, "method": "GET"}
        try:
            await self.app(asked, receive, bodiless)
        finally:
            if "route" in asked:
                scope["route"] = asked["route"]


def forged(method: str, headers: Mapping[str, str]) -> APIError | None:
    """Return why a request that writes is refused: a page of another origin may have sent it. None if it cannot be."""
    if method in _READS:
        return None
    site, origin = headers.get("sec-fetch-site"), headers.get("origin")
    # A browser sets the first itself, so it also holds behind a proxy that gives the server another name.
    foreign = site not in ("same-origin", "none") if site is not None else origin not in (None, *_own(headers))
    if foreign:
        return APIError(403, "a page of another origin may not ask for this", code="origin")
    if method == "POST" and not _json(headers.get("content-type", "")) and not _not_simple(headers):
        return APIError(415, "a POST needs the header Content-Type: application/json", code="content_type")
    return None


def _own(headers: Mapping[str, str]) -> list[str]:
    """Return the origins of the server's own pages, by the name that the request gives it."""
    host = headers.get("host", "").lower()
    return [f"http://{host}", f"https://{host}"]


def _json(kind: str) -> bool:
    kind = kind.partition(";")[0].strip().lower()
    return kind == "application/json" or (kind.startswith("application/") and kind.endswith("+json"))


def _not_simple(headers: Mapping[str, str]) -> bool:
    """Whether a browser would have asked the server first (a CORS preflight), which never allows anything."""
    return "authorization" in headers or "x-requested-with" in headers
