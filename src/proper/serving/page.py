"""`/`: the playground, a page for people made of the files in `page/`. Knows nothing about models or users.

It asks the API as any other client does and holds no data, so it needs no key; the policy sent with it lets a browser
load and ask nothing but this server.
"""

# No postponed annotations here: FastAPI could not look up those that are made inside a function.

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
    # After an update of the package, nobody keeps half of the old page.
    "Cache-Control": "no-cache",
}
KINDS = {".html": "text/html", ".css": "text/css", ".js": "text/javascript"}


def page_routes() -> APIRouter:
    """Return the routes of the page; its files are read once."""
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
