"""Connection limits for uvicorn: number of connections, timeouts for headers and bodies, slow readers.

uvicorn's own protocol has a timeout only for idle connections between requests.
"""

from __future__ import annotations

import asyncio
import json
import resource
import socket
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import h11
from uvicorn.protocols.http.h11_impl import H11Protocol

from proper.serving.errors import APIError

ACCEPTED_AT_ONCE = 16
"""Connections that the event loop accepts before it checks their number."""
_TURNS = 3
"""Event loop iterations from accepting an excess connection to closing it; each may accept `ACCEPTED_AT_ONCE` more."""
RESERVED = _TURNS * ACCEPTED_AT_ONCE + 112
"""File descriptors reserved for the store, the interaction log, weights and the worker."""
MAX_CONNECTIONS = 4096
"""Most open connections, if the limit on open files allows as many."""


@dataclass(frozen=True)
class ConnectionLimits:
    """Limits above which a connection is closed or refused.

    Attributes:
        total: connections in all; None takes what the limit of open files leaves.
        per_address: connections of one address; None takes half of `total`.
        header_seconds: time from a request's first byte, or from connecting, to the end of its headers.
        body_seconds: time from the end of the headers to the end of the body.
        unread_seconds: time for which a client may leave a reply unread.
        keep_alive_seconds: idle time between a reply and the next request.
    """

    total: int | None = None
    per_address: int | None = None
    header_seconds: float = 20.0
    body_seconds: float = 60.0
    unread_seconds: float = 60.0
    keep_alive_seconds: int = 75

    @property
    def most(self) -> int:
        """Most connections in all."""
        return descriptors_left() if self.total is None else min(self.total, descriptors_left())

    @property
    def most_per_address(self) -> int:
        """Most connections of one address."""
        return max(1, self.most // 2) if self.per_address is None else self.per_address


def descriptors_left() -> int:
    """Return how many connections the process's limit of open files allows beyond the reserved files; at least 8."""
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    return MAX_CONNECTIONS if soft == resource.RLIM_INFINITY else min(MAX_CONNECTIONS, max(8, soft - RESERVED))


class ConnectionCounter:
    """Counter of open connections, in all and by address. Not thread-safe."""

    def __init__(self, limits: ConnectionLimits) -> None:
        self.limits, self.most, self.most_per_address = limits, limits.most, limits.most_per_address
        self._open: Counter[str] = Counter()

    def enter(self, address: str) -> str | None:
        """Count a new connection and return None; return the reason if it is one too many."""
        if self._open.total() >= self.most:
            return "the server has too many connections"
        if self._open[address] >= self.most_per_address:
            return "this address has too many connections"
        self._open[address] += 1
        return None

    def leave(self, address: str) -> None:
        """Count a closed connection."""
        self._open[address] -= 1
        if not self._open[address]:
            del self._open[address]


class TimedProtocol(H11Protocol):
    """uvicorn's protocol with deadlines for each part of a request and for reading the reply."""

    def __init__(self, counter: ConnectionCounter, **settings: Any) -> None:
        super().__init__(**settings)
        self._counter, self._address = counter, ""
        self._counted = False
        self._awaited: str | None = None
        self._deadline: asyncio.TimerHandle | None = None
        self._unread: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Accept a connection, or reply 503 if there are too many."""
        super().connection_made(transport)
        self._address = self.client[0] if self.client else ""
        _bound_unread(transport.get_extra_info("socket"), self._counter.limits.unread_seconds)
        refused = self._counter.enter(self._address)
        if refused is not None:
            self._refuse(APIError(503, refused, code="connections", headers={"Retry-After": "1"}))
            return
        self._counted = True
        self._await("header")

    def connection_lost(self, exc: Exception | None) -> None:
        """Cancel the deadlines and count the connection as closed."""
        self._await(None)
        self.resume_writing()
        if self._counted:
            self._counted = False
            self._counter.leave(self._address)
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        """Process received bytes, unless the connection is closing."""
        if not self.transport.is_closing():
            super().data_received(data)

    def handle_events(self) -> None:
        """Handle complete events, then set the deadline for the next part of the request."""
        super().handle_events()
        state = self.conn.their_state
        if self.transport.is_closing():
            self._await(None)
        elif state is h11.SEND_BODY:
            self._await("body")
        elif state is h11.IDLE and (self.conn.trailing_data[0] or self.cycle is None):
            self._await("header")
        else:
            self._await(None)

    def send_400_response(self, msg: str) -> None:
        """Refuse a request that is not HTTP, or whose headers are too long, in the form of all other errors."""
        if self.cycle is not None and self.cycle.response_started:
            self.transport.abort()  # an error cannot follow half a reply
            return
        self._refuse(APIError(400, msg, code="http"))

    def pause_writing(self) -> None:
        """Start the deadline for a client that does not read its reply."""
        super().pause_writing()
        if self._unread is None:
            self._unread = self.loop.call_later(self._counter.limits.unread_seconds, self.transport.abort)

    def resume_writing(self) -> None:
        """Cancel that deadline: the client has read."""
        if self._unread is not None:
            self._unread.cancel()
            self._unread = None
        super().resume_writing()

    def _await(self, part: str | None) -> None:
        """Set the deadline for a part of a request; further bytes of the same part do not extend it."""
        if part == self._awaited:
            return
        self._awaited = part
        if self._deadline is not None:
            self._deadline.cancel()
            self._deadline = None
        if part is not None:
            limits = self._counter.limits
            seconds = limits.header_seconds if part == "header" else limits.body_seconds
            self._deadline = self.loop.call_later(seconds, self._late, part, seconds)

    def _late(self, part: str, seconds: float) -> None:
        why = f"the request's {part} did not come within {seconds:g} s"
        if self.cycle is not None and self.cycle.response_started and not self.cycle.response_complete:
            self.transport.abort()  # an error cannot follow half a reply
        elif self.cycle is not None and self.cycle.response_complete and part == "body":
            self.transport.close()  # already answered, with 413 for example
        else:
            self._refuse(APIError(408, why, code="timeout"))

    def _refuse(self, refusal: APIError) -> None:
        body = json.dumps(refusal.body()).encode()
        reason = {400: "Bad Request", 408: "Request Timeout", 503: "Service Unavailable"}[refusal.status]
        headers = {
            "Content-Type": "application/json",
            "Content-Length": str(len(body)),
            **refusal.headers,
            "Connection": "close",
        }
        head = "".join(f"{name}: {value}\r\n" for name, value in headers.items())
        self.transport.write(f"HTTP/1.1 {refusal.status} {reason}\r\n{head}\r\n".encode() + body)
        self.transport.close()


def protocol(limits: ConnectionLimits) -> Callable[..., TimedProtocol]:
    """Return the protocol factory of a server; all its connections share one counter."""
    counter = ConnectionCounter(limits)
    return lambda **settings: TimedProtocol(counter, **settings)


def _bound_unread(connection: Any, seconds: float) -> None:
    """Have the kernel drop a connection that does not acknowledge sent data, even after the server closed it."""
    option = getattr(socket, "TCP_USER_TIMEOUT", None)
    if option is not None and connection is not None and connection.family in (socket.AF_INET, socket.AF_INET6):
        connection.setsockopt(socket.IPPROTO_TCP, option, int(1000 * seconds))
