"""uvicorn server process: listening socket, and graceful shutdown on SIGTERM (drain running requests, accept no new).

An engine failure shuts the server down in the same way, with an exit code that makes its supervisor restart it.
"""

from __future__ import annotations

import signal
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import uvicorn
from starlette.types import ASGIApp

from proper.errors import InputError, ProperError
from proper.serving.auth import is_loopback
from proper.serving.connections import ACCEPTED_AT_ONCE, ConnectionLimits, protocol
from proper.serving.engines import EngineRunner
from proper.serving.keys import Keys

BACKLOG = 2048
"""Listen backlog: connections that the kernel queues for the event loop."""


def require_keys(host: str, keys: Keys, how: str) -> None:
    """Refuse to listen beyond loopback without keys.

    Raises:
        InputError: `host` is not loopback and there are no keys; `how` is the advice in the message.
    """
    if not is_loopback(host) and not len(keys):
        raise InputError(f"--host {host}: a server beyond loopback requires API keys; {how}")


class Server(uvicorn.Server):
    """A uvicorn server that returns after a signal instead of raising it again: the caller decides how to exit.

    Attributes:
        on_hangup: called on a thread of its own after SIGHUP.
    """

    on_hangup: Callable[[], None] | None = None

    def end(self) -> None:
        """Accept no new requests and make `run` return when the running ones have their replies; thread-safe."""
        self.should_exit = True

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Listen with a backlog of `BACKLOG`, so that connections wait in the kernel while the event loop is busy."""
        await super().startup(sockets)
        for bound in sockets or []:
            bound.listen(BACKLOG)

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Handle SIGINT and SIGTERM by draining, and restore the previous handlers afterwards."""
        if threading.current_thread() is not threading.main_thread():  # only the main thread can handle signals
            yield
            return
        before = {number: signal.signal(number, self.handle_exit) for number in (signal.SIGINT, signal.SIGTERM)}
        if self.on_hangup is not None:
            renew = self.on_hangup
            before[signal.SIGHUP] = signal.signal(signal.SIGHUP, lambda *_: threading.Thread(target=renew).start())
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)


def free_port(host: str, port: int) -> socket.socket:
    """Return a bound socket, so that an address in use is known before a model is loaded.

    Raises:
        InputError: the address cannot be bound.
    """
    try:
        family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0][0]
        with ExitStack() as stack:
            bound = stack.enter_context(socket.socket(family, socket.SOCK_STREAM))
            bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            bound.bind((host, port))
            stack.pop_all()
    except OSError as error:
        raise InputError(f"--host {host} --port {port}: {error.strerror or error}") from error
    return bound


def require_no_failure(runner: EngineRunner) -> None:
    """Check that an engine thread was stopped and did not fail.

    Raises:
        ProperError: the engine failed.
    """
    error = runner.error
    if error is not None:
        reason = str(error) if isinstance(error, ProperError) else f"{type(error).__name__}: {error}"
        raise ProperError(f"the engine has stopped: {reason}") from error


def make_server(app: ASGIApp, drain_seconds: int, connections: ConnectionLimits | None = None) -> Server:
    """Return a server for an application; `run` returns when it has drained."""
    connections = connections or ConnectionLimits()
    made: Any = protocol(connections)
    return Server(
        uvicorn.Config(
            app,
            http=made,
            ws="none",
            # Not uvloop, which the extra `cluster` installs: the limits on connections use asyncio's own transports.
            loop="asyncio",
            # The event loop accepts this many at once; `startup` sets a longer backlog for the kernel.
            backlog=ACCEPTED_AT_ONCE,
            # Its warnings are about what strangers send: requests that are not HTTP, offers of HTTP/2 or WebSocket.
            log_level="error",
            access_log=False,
            server_header=False,
            timeout_graceful_shutdown=drain_seconds,
            timeout_keep_alive=connections.keep_alive_seconds,
        )
    )
