"""In front of every route that needs a key: whose request it is and whether the key may ask now, before a body is read.

A refused request counts for the rate like any other; one without a valid key counts for its address. Knows nothing
about routes but which are open to everybody.
"""

from __future__ import annotations

import asyncio
from contextlib import ExitStack

from fastapi import Request
from fastapi.responses import JSONResponse
from starlette.types import ASGIApp, Receive, Scope, Send

from proper.errors import ProperError
from proper.serving.auth import Authenticator
from proper.serving.errors import APIError
from proper.serving.rate_limits import RateLimiter

OPEN = ("/", "/healthz", "/readyz", "/openapi.json")
"""Paths that need no key; what lies below /page/ needs none either."""


class Admission:
    """Wraps an ASGI application."""

    def __init__(self, app: ASGIApp, *, gate: Authenticator, turnstile: RateLimiter) -> None:
        self.app, self.gate, self.turnstile = app, gate, turnstile

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one request."""
        if scope["type"] != "http" or scope["path"] in OPEN or scope["path"].startswith("/page/"):
            await self.app(scope, receive, send)
            return
        with ExitStack() as held:
            try:
                await self._enter(scope, held)
            except APIError as refusal:
                await JSONResponse(refusal.body(), refusal.status, headers=refusal.headers)(scope, receive, send)
                return
            await self.app(scope, receive, send)

    async def _enter(self, scope: Scope, held: ExitStack) -> None:
        try:
            principal = await asyncio.to_thread(self.gate.principal, Request(scope))  # it may read the file of keys
        except APIError:
            self.turnstile.count(f"address {(scope.get('client') or ('',))[0]}")
            raise
        except ProperError as error:
            raise APIError(500, "the server's keys cannot be read", code="keys") from error
        held.enter_context(self.turnstile.visit(principal.id))
        scope.setdefault("state", {})["principal"] = principal
