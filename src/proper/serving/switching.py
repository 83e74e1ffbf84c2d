"""ASGI application that can be replaced while requests run, to switch a server to another run."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable
from concurrent.futures import CancelledError, wait
from contextlib import AbstractAsyncContextManager, AbstractContextManager, ExitStack
from dataclasses import dataclass, field

from fastapi import FastAPI
from starlette.types import Receive, Scope, Send

from proper.errors import ProperError

_POLL_SECONDS = 0.5  # between two looks whether the server's loop has ended

Application = FastAPI
"""Type of the result of `create_app`."""


@dataclass(eq=False)
class _Started:
    """An application whose lifespan has begun, and its open requests."""

    app: FastAPI
    lifespan: AbstractAsyncContextManager[object]
    open: int = 0
    idle: asyncio.Event = field(default_factory=asyncio.Event)


class SwitchableApp:
    """Passes every request to the current application.

    Args:
        opened: opens an application; the first one, here.
    """

    def __init__(self, opened: Callable[[], AbstractContextManager[FastAPI]]) -> None:
        self._opened, self._kept = opened, ExitStack()
        self._first = self._kept.enter_context(opened())
        self._current: _Started | None = None
        self._loop: asyncio.AbstractEventLoop | None = None
        self._ended = False
        self._renewing = threading.Lock()

    def close(self) -> None:
        """Close the current application, after the server has stopped."""
        self._kept.close()

    def renew(self) -> None:
        """Open an application, pass it all new requests, and close the former one after its last reply.

        For another thread than the server's. A call waits for the end of one that has begun: the second would otherwise
        close the resources of the first's former application, which may still have requests.

        Raises:
            ProperError: the server has not started yet, or has stopped.
        """
        with self._renewing:
            if self._loop is None or self._loop.is_closed():
                raise ProperError("the server is not running")
            with ExitStack() as stack:
                app = stack.enter_context(self._opened())
                self._switch_on(self._loop, app)
                former, self._kept = self._kept, stack.pop_all()
            former.close()

    def _switch_on(self, loop: asyncio.AbstractEventLoop, app: FastAPI) -> None:
        """Run `_switch` on the server's loop and wait for it; the loop may end at any moment.

        Raises:
            ProperError: the server has stopped.
        """
        switch = self._switch(app)
        try:
            future = asyncio.run_coroutine_threadsafe(switch, loop)
        except RuntimeError as error:
            switch.close()
            raise ProperError("the server has stopped") from error
        while not future.done():
            wait([future], _POLL_SECONDS)
            if loop.is_closed():  # what it has not begun it never will
                future.cancel()
        try:
            future.result()
        except CancelledError as error:
            switch.close()
            raise ProperError("the server has stopped") from error

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one request, or the lifespan of the server."""
        if scope["type"] == "lifespan":
            await self._live(receive, send)
            return
        current = self._current
        assert current is not None, "requests come after the start"
        current.open += 1
        current.idle.clear()
        try:
            await current.app(scope, receive, send)
        finally:
            current.open -= 1
            if not current.open:
                current.idle.set()

    async def _switch(self, app: FastAPI) -> None:
        if self._ended:
            raise ProperError("the server has stopped")
        former, self._current = self._current, await _started(app)
        assert former is not None
        await former.idle.wait()
        # On another thread: stopping a fit worker takes seconds.
        await asyncio.to_thread(lambda: asyncio.run(_stop(former)))

    async def _live(self, receive: Receive, send: Send) -> None:
        await receive()
        try:
            self._loop, self._current = asyncio.get_running_loop(), await _started(self._first)
        except Exception as error:
            await send({"type": "lifespan.startup.failed", "message": f"{type(error).__name__}: {error}"})
            raise
        await send({"type": "lifespan.startup.complete"})
        await receive()
        self._ended = True
        await _stop(self._current)
        await send({"type": "lifespan.shutdown.complete"})


async def _started(app: FastAPI) -> _Started:
    lifespan = app.router.lifespan_context(app)
    await lifespan.__aenter__()
    started = _Started(app, lifespan)
    started.idle.set()
    return started


async def _stop(started: _Started) -> None:
    await started.lifespan.__aexit__(None, None, None)
