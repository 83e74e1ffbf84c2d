"""Connections: how many there may be, and how long one may take over a request or leave a reply unread.

uvicorn's own protocol closes idle connections between requests only. Knows nothing about what is asked.
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
"""Connections that the event loop takes in before it looks whether they are too many."""
_TURNS = 3
"""Turns of the event loop from taking in a connection to closing it as one too many; each may take in as many again."""
RESERVED = _TURNS * ACCEPTED_AT_ONCE + 112
"""File descriptors that connections never get: the store, the log, weights, the worker."""
MOST = 4096


@dataclass(frozen=True)
class ConnectionLimits:
    """What closes or refuses a connection.

    Attributes:
        total: connections of everybody; None takes what the limit of open files leaves.
        per_address: connections of one address; None takes half of `total`.
        header_seconds: from a request's first byte, or the connection, to the end of its headers.
        body_seconds: from there to the end of its body.
        unread_seconds: for which a reply may stay unread.
        keep_alive_seconds: between a reply and the next request.
    """

    total: int | None = None
    per_address: int | None = None
    header_seconds: float = 20.0
    body_seconds: float = 60.0
    unread_seconds: float = 60.0
    keep_alive_seconds: int = 75

    @property
    def most(self) -> int:
        """Connections of everybody."""
        return descriptors_left() if self.total is None else min(self.total, descriptors_left())

    @property
    def most_per_address(self) -> int:
        """Connections of one address."""
        return max(1, self.most // 2) if self.per_address is None else self.per_address


def descriptors_left() -> int:
    """Return how many connections the process's limit of open files allows beside its own files; at least 8."""
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    return MOST if soft == resource.RLIM_INFINITY else min(MOST, max(8, soft - RESERVED))


class Doors:
    """Counts open connections. For one thread."""

    def __init__(self, limits: ConnectionLimits) -> None:
        self.limits, self.most, self.most_per_address = limits, limits.most, limits.most_per_address
        self._open: Counter[str] = Counter()

    def enter(self, address: str) -> str | None:
        """Count a connection, and return None; or why there may be no more."""
        if self._open.total() >= self.most:
            return "the server has too many connections"
        if self._open[address] >= self.most_per_address:
            return "this address has too many connections"
        self._open[address] += 1
        return None

    def leave(self, address: str) -> None:
        """Count one less."""
        self._open[address] -= 1
        if not self._open[address]:
            del self._open[address]


class TimedProtocol(H11Protocol):
    """uvicorn's protocol with deadlines for each part of a request and for reading the reply."""

    def __init__(self, doors: Doors, **settings: Any) -> None:
        super().__init__(**settings)
        self._doors, self._address = doors, ""
        self._entered = False
        self._awaited: str | None = None
        self._deadline: asyncio.TimerHandle | None = None
        self._unread: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Take a connection in, or say that there are too many."""
        super().connection_made(transport)
        self._address = self.client[0] if self.client else ""
        _bound_unread(transport.get_extra_info("socket"), self._doors.limits.unread_seconds)
        refused = self._doors.enter(self._address)
        if refused is not None:
            self._refuse(APIError(503, refused, code="connections", headers={"Retry-After": "1"}))
            return
        self._entered = True
        self._await("header")

    def connection_lost(self, exc: Exception | None) -> None:
        """Let a connection go."""
        self._await(None)
        self.resume_writing()
        if self._entered:
            self._entered = False
            self._doors.leave(self._address)
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        """Take in a part of a request."""
        if not self.transport.is_closing():
            super().data_received(data)

    def handle_events(self) -> None:
        """Handle what is complete, and see what has to come next, and by when."""
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

    def pause_writing(self) -> None:
        """The client reads more slowly than it is sent to; for so long and no longer."""
        super().pause_writing()
        if self._unread is None:
            self._unread = self.loop.call_later(self._doors.limits.unread_seconds, self.transport.abort)

    def resume_writing(self) -> None:
        """The client has read."""
        if self._unread is not None:
            self._unread.cancel()
            self._unread = None
        super().resume_writing()

    def _await(self, part: str | None) -> None:
        """Set the deadline for a part of a request; more of the same part does not move it."""
        if part == self._awaited:
            return
        self._awaited = part
        if self._deadline is not None:
            self._deadline.cancel()
            self._deadline = None
        if part is not None:
            limits = self._doors.limits
            seconds = limits.header_seconds if part == "header" else limits.body_seconds
            self._deadline = self.loop.call_later(seconds, self._late, part, seconds)

    def _late(self, part: str, seconds: float) -> None:
        why = f"the request's {part} did not come within {seconds:g} s"
        if self.cycle is not None and self.cycle.response_started and not self.cycle.response_complete:
            self.transport.abort()  # half a reply cannot be followed by another one
        elif self.cycle is not None and self.cycle.response_complete and part == "body":
            self.transport.close()  # it has been answered: too large, for one
        else:
            self._refuse(APIError(408, why, code="timeout"))

    def _refuse(self, refusal: APIError) -> None:
        body = json.dumps(refusal.body()).encode()
        reason = {408: "Request Timeout", 503: "Service Unavailable"}[refusal.status]
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
    """Return what makes the protocol of each connection of a server; they are counted together."""
    doors = Doors(limits)
    return lambda **settings: TimedProtocol(doors, **settings)


def _bound_unread(connection: Any, seconds: float) -> None:
    """Have the kernel drop a connection that does not take what was sent, also after it was closed from here."""
    option = getattr(socket, "TCP_USER_TIMEOUT", None)
    if option is not None and connection is not None and connection.family in (socket.AF_INET, socket.AF_INET6):
        connection.setsockopt(socket.IPPROTO_TCP, option, int(1000 * seconds))
