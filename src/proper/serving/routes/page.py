"""Route `/`: the playground, a static web page from the files in `page/`.

The page calls the API as any other client does and holds no data, so it needs no key. Its Content-Security-Policy lets
a browser load from and send to this server only.
"""

# No `from __future__ import annotations`: FastAPI could not resolve the types that are defined inside a function.

from importlib.resources import files
from pathlib import PurePath

from fastapi import APIRouter, Response

from proper.serving.errors import APIError

POLICY = "; ".join(
    (
        "default-src 'none'",
        "script-src 'self'",
        "style-src 'self'",
        "connect-src 'self'",
        "img-src data:",
        "base-uri 'none'",
        "form-action 'none'",
        "frame-ancestors 'none'",
        "require-trusted-types-for 'script'",
        "trusted-types 'none'",
    )
)
HEADERS = {
    "Content-Security-Policy": POLICY,
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    # After an update of the package, no browser mixes old and new files of the page.
    "Cache-Control": "no-cache",
}
KINDS = {".html": "text/html", ".css": "text/css", ".js": "text/javascript"}


def page_routes() -> APIRouter:
    """Return the routes of the page; its files are read once, here."""
    router = APIRouter(include_in_schema=False)
    folder = files("proper.serving") / "page"
    parts = {part.name: part.read_bytes() for part in folder.iterdir() if PurePath(part.name).suffix in KINDS}

    def reply(name: str) -> Response:
        kind = f"{KINDS[PurePath(name).suffix]}; charset=utf-8"
        return Response(parts[name], media_type=kind, headers=HEADERS)

    @router.get("/")
    async def page() -> Response:
        return reply("index.html")

    @router.get("/page/{name}")
    async def part(name: str) -> Response:
        if name not in parts:
            raise APIError(404, "the page has no such part", code="http")
        return reply(name)

    return router
