"""Requests to an engine in this process: the events of each, and steps of the engine until all have ended."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from proper.inference.engine import Engine
from proper.inference.requests import Event, Finished, Request, RequestHandle, Started, Token
from proper.inference.sampling import Sampling
from proper.run_folder import Tier


@dataclass
class Listener:
    """The sink of one request, with the events that it was sent; nothing follows the end."""

    events: list[Event] = field(default_factory=list)

    def __call__(self, event: Event) -> None:
        assert not self.done, "nothing follows the end"
        self.events.append(event)

    @property
    def tokens(self) -> list[int]:
        return [event.id for event in self.events if isinstance(event, Token)]

    @property
    def started(self) -> Started:
        (event,) = [event for event in self.events if isinstance(event, Started)]
        return event

    @property
    def done(self) -> bool:
        return bool(self.events) and isinstance(self.events[-1], Finished)

    @property
    def end(self) -> Finished:
        assert isinstance(self.events[-1], Finished)
        return self.events[-1]


def submit(
    engine: Engine,
    prompt: Sequence[int],
    user: str | None,
    length: int = 6,
    *,
    tier: Tier = Tier.USERS,
    gates: bool = False,
    **sampling: Any,
) -> tuple[Listener, RequestHandle]:
    """Submit a request of token ids."""
    listener = Listener()
    request = Request(tuple(prompt), user, tier=tier, sampling=Sampling(length, **sampling), gates=gates)
    return listener, engine.submit(request, listener)


def finish(engine: Engine) -> None:
    """Let the engine step until it is idle, while adapters load as fast as they do."""
    for _ in _until_idle(engine):
        if engine.blocked:
            time.sleep(0.001)


def finish_settled(engine: Engine) -> None:
    """Let the engine step until it is idle; each step waits for the loads that have begun."""
    for _ in _until_idle(engine):
        engine.settle()


def _until_idle(engine: Engine) -> Iterator[None]:
    """Yield before every step."""
    deadline = time.monotonic() + 60
    while not engine.idle:
        assert time.monotonic() < deadline, "stuck"
        yield
        engine.step()
