"""Noisy-neighbour load of `proper bench serve`: one quiet API key beside one that floods the engine."""

from __future__ import annotations

import random
import time
from collections.abc import Callable
from dataclasses import dataclass, field

from proper.benchmarks.serve_people import Served
from proper.errors import ProperError
from proper.inference.engine import Engine
from proper.inference.requests import EngineLimits, Event, Finished, Request, Started
from proper.inference.sampling import Sampling

FLOOD = 3
"""Requests per row that the flooding key keeps open."""


@dataclass
class QuietWaits:
    """Waiting times of the quiet key.

    Attributes:
        steps: for each request, engine steps until it had a row; 1 is the next step.
        seconds: for each request, seconds until its answer was complete.
    """

    steps: list[int] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)


def quiet_key(served: Served, rows: int, asks: int, *, flooded: bool) -> QuietWaits:
    """Send `asks` requests of one key, each after the last answer and a pause of at most an answer's steps.

    The first request, before any flood, is not counted: it loads the adapter and registers the key.

    Args:
        served: model and users; the quiet key asks for the first user, the flood for all others.
        rows: rows of the engine.
        asks: number of counted requests.
        flooded: whether another key keeps `FLOOD` requests per row open.
    """
    served.mix(True)
    engine, draw, asked = (
        Engine(served.personal, EngineLimits(rows=rows, prefix_bytes=0)),
        random.Random(0),
        QuietWaits(),
    )
    quiet = _Quiet(engine, Request(served.prompts[0], served.names[0], sampling=_length(served), client="quiet"))
    quiet.answer(QuietWaits())
    open_floods = [0]

    def flood(event: Event) -> None:
        open_floods[0] -= isinstance(event, Finished)

    def refill() -> None:
        while flooded and open_floods[0] < FLOOD * rows:
            open_floods[0] += 1
            user, prompt = draw.choice(served.names[1:]), draw.choice(served.prompts)
            engine.submit(Request(prompt, user, sampling=_length(served), client="flood"), flood)

    for _ in range(asks):
        for _ in range(draw.randint(0, served.shape.answer) if flooded else 0):
            refill()
            engine.step()
        quiet.answer(asked, refill)
    stats = engine.stats()
    engine.close()
    if stats.errors or stats.fallbacks:
        raise ProperError(f"bench serve: {stats.errors} requests failed, {stats.fallbacks} lost their adapter")
    return asked


def _nothing() -> None:
    """Do nothing: without a flood there are no requests to refill."""


class _Quiet:
    """Sequential requests of one key."""

    def __init__(self, engine: Engine, request: Request) -> None:
        self.engine, self.request = engine, request
        self.started = self.done = False

    def answer(self, asked: QuietWaits, between: Callable[[], None] = _nothing) -> None:
        """Send one request, step the engine until the answer is complete, and record steps and seconds."""
        self.started = self.done = False
        begun, steps = time.perf_counter(), 0
        self.engine.submit(self.request, self._hear)
        while not self.done:
            between()
            with self.engine.changed:
                self.engine.changed.wait_for(lambda: not self.engine.blocked)
            steps += not self.started
            self.engine.step()
        asked.steps.append(steps)
        asked.seconds.append(time.perf_counter() - begun)

    def _hear(self, event: Event) -> None:
        self.started |= isinstance(event, Started)
        self.done |= isinstance(event, Finished)


def _length(served: Served) -> Sampling:
    return Sampling(served.shape.answer)
