"""ASGI middleware for authentication and rate limits; it runs before the request body is read.

A refused request counts towards the key's rate like any other; a request without a valid key counts towards the rate of
its address.
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
"""Paths that need no key; paths below /page/ need none either."""


class Admission:
    """ASGI middleware that authenticates a request and applies the rate limits."""

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
            principal = await asyncio.to_thread(self.gate.principal, Request(scope))  # may read the key file
        except APIError:
            self.turnstile.count(f"address {(scope.get('client') or ('',))[0]}")
            raise
        except ProperError as error:
            raise APIError(500, "the server's keys cannot be read", code="keys") from error
        held.enter_context(self.turnstile.visit(principal.id))
        scope.setdefault("state", {})["principal"] = principal
