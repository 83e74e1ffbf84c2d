"""Loads of `proper bench serve`: closed loop (all requests at once), open loop (random arrivals), noisy neighbour.

In the loops every token of every request gets a timestamp. The noisy neighbour is an API key that floods the engine
beside a quiet key, whose waits are measured.
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig, StoppingCriteria, StoppingCriteriaList

from proper.adapters.slot_cache import CacheCounts
from proper.benchmarks.measure import TimedSide
from proper.benchmarks.serve_setup import Served
from proper.errors import ProperError
from proper.inference.engine import Engine
from proper.inference.engine_thread import EngineThread
from proper.inference.forward import pad_left
from proper.inference.requests import EngineLimits, Event, Finished, Request, Sink, Started, Token
from proper.inference.sampling import Sampling

Times = list[list[float]]
"""For each request: seconds from its arrival to each of its tokens."""


class ClosedLoop:
    """Closed loop: every side answers the same prompts, all submitted at the start.

    Attributes:
        times: token times by side, over all repeats after the first.
    """

    def __init__(self, served: Served, alone: int) -> None:
        self.served, self.times = served, dict[str, Times]()
        self._alone, self._engine = alone, Engine(served.alone, EngineLimits(rows=1))

    def sides(self) -> dict[str, TimedSide]:
        """Return the sides to compare. Each side's memory is prepared before it is timed."""
        served, rows = self.served, self.served.shape.rows
        users, others = served.names[:rows], served.names[rows : 2 * rows]
        one = users[:1] * rows
        sides = {
            "base": self._by_engine("base", users, users, bare=True),
            "one": self._by_engine("one", one, one),
            "mixed": self._by_engine("mixed", users, users),
            "crowd": self._by_engine("crowd", users, others),
            "plain": self._by_engine("plain", users, users, experts=False),
            "peft": self._by_generate("peft", served.peft, [range(rows)], adapter_names=users),
            "generate": self._by_generate("generate", served.bare, [range(rows)]),
            "loop": self._by_generate("loop", served.bare, [[at] for at in range(min(self._alone, rows))]),
        }
        self.times = {name: [] for name in sides}
        return sides

    def counts(self) -> CacheCounts:
        """Return the slot cache counters of the current engine."""
        return self._engine.stats().adapters

    def _by_engine(
        self, name: str, users: Sequence[str], before: Sequence[str], *, experts: bool = True, bare: bool = False
    ) -> TimedSide:
        """Return a side that runs the engine for `users`, after it has answered `before`."""
        served, rows = self.served, self.served.shape.rows

        def prepare(_: int) -> None:
            self._engine.close()
            served.mix(experts)
            self._engine = Engine(
                served.alone if bare else served.personal,
                EngineLimits(rows, slots=rows, prefill=1 << 30, prefix_bytes=0),
            )
            answer_all(self._engine, [(5,)] * rows, before, 1, [])

        def work(at: int) -> None:
            found: Times = []
            answer_all(self._engine, served.prompts, users, served.shape.answer, found)
            self.times[name] += found if at else []

        return TimedSide(work, prepare)

    def _by_generate(self, name: str, model: Any, batches: Sequence[Sequence[int]], **more: Any) -> TimedSide:
        """Return a side that runs transformers' generate batch by batch; a batch arrives when its turn comes."""
        served, length = self.served, self.served.shape.answer
        settings = GenerationConfig(  # type: ignore[no-untyped-call]
            max_new_tokens=length, min_new_tokens=length, do_sample=False, pad_token_id=0, use_cache=True
        )

        def work(at: int) -> None:
            for batch in batches:
                ids, mask = pad_left([served.prompts[row] for row in batch], 0, served.device)
                clock = _Clock()
                with torch.no_grad():
                    model.generate(
                        input_ids=ids,
                        attention_mask=mask,
                        generation_config=settings,
                        stopping_criteria=StoppingCriteriaList([clock]),
                        **more,
                    )
                self.times[name] += [list(clock.stamps) for _ in batch] if at else []

        return TimedSide(work)


def open_loop(served: Served, rows: int, slots: int, rate: float, arrivals: int, seed: int) -> Times:
    """Run an open loop with random arrivals of all users; waiting time counts from the scheduled arrival.

    Args:
        served: model and users.
        rows: rows of the engine.
        slots: adapter slots of the engine.
        rate: requests per second.
        arrivals: number of requests.
        seed: seed of arrival times and users.
    """
    served.mix(True)
    users = served.names
    engine = Engine(served.personal, EngineLimits(rows=rows, slots=slots, prefix_bytes=0))
    answer_all(engine, [(5,)] * len(users), users, 1, [])
    runner = EngineThread(engine)
    runner.start()
    draw, due, times = random.Random(seed), 0.0, Times()
    begun = time.perf_counter()
    for at in range(arrivals):
        due += draw.expovariate(rate)
        time.sleep(max(0.0, begun + due - time.perf_counter()))
        prompt = served.prompts[at % len(served.prompts)]
        request = Request(prompt, draw.choice(users), sampling=Sampling(served.shape.answer))
        times.append([])
        engine.submit(request, _stamped(begun + due, times[-1]))
    runner.drain(float("inf"))
    runner.stop()
    _check(engine)
    return times


class _Clock(StoppingCriteria):
    """Stopping criterion that only records the time of each token and never stops."""

    def __init__(self) -> None:
        self.begun, self.stamps = time.perf_counter(), list[float]()

    def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Any:
        self.stamps.append(time.perf_counter() - self.begun)
        return torch.zeros(len(input_ids), dtype=torch.bool, device=input_ids.device)


def answer_all(
    engine: Engine, prompts: Sequence[tuple[int, ...]], users: Sequence[str], length: int, times: Times
) -> None:
    """Answer all requests on this thread; `times` receives the token times of each."""
    begun = time.perf_counter()
    for prompt, user in zip(prompts, users, strict=True):
        times.append([])
        engine.submit(Request(prompt, user, sampling=Sampling(length)), _stamped(begun, times[-1]))
    while not engine.idle:
        with engine.changed:
            engine.changed.wait_for(lambda: not engine.blocked)
        engine.step()
    _check(engine)


def _stamped(due: float, stamps: list[float]) -> Sink:
    def note(event: Event) -> None:
        if isinstance(event, Token):
            stamps.append(time.perf_counter() - due)

    return note


def _check(engine: Engine) -> None:
    stats = engine.stats()
    if stats.errors or stats.fallbacks:
        raise ProperError(f"bench serve: {stats.errors} requests failed, {stats.fallbacks} lost their adapter")


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


def quiet_key(served: Served, rows: int, asks: int, *, flooded: bool, settled: bool = False) -> QuietWaits:
    """Send `asks` requests of one key, each after the last answer and a pause of at most an answer's steps.

    The first request, before any flood, is not counted: it loads the adapter and registers the key.

    Args:
        served: model and users; the quiet key asks for the first user, the flood for all others.
        rows: rows of the engine.
        asks: number of counted requests.
        flooded: whether another key keeps `FLOOD` requests per row open.
        settled: wait for started loads before each step, so that steps do not depend on the loading thread's speed.
    """
    served.mix(True)
    engine = Engine(served.personal, EngineLimits(rows=rows, prefix_bytes=0))
    draw, waits = random.Random(0), QuietWaits()
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
        if settled:
            engine.settle()

    for _ in range(asks):
        for _ in range(draw.randint(0, served.shape.answer) if flooded else 0):
            refill()
            engine.step()
        quiet.answer(waits, refill)
    stats = engine.stats()
    engine.close()
    if stats.errors or stats.fallbacks:
        raise ProperError(f"bench serve: {stats.errors} requests failed, {stats.fallbacks} lost their adapter")
    return waits


def _nothing() -> None:
    """Do nothing: without a flood there are no requests to refill."""


class _Quiet:
    """Sequential requests of one key."""

    def __init__(self, engine: Engine, request: Request) -> None:
        self.engine, self.request = engine, request
        self.started = self.done = False

    def answer(self, waits: QuietWaits, between: Callable[[], None] = _nothing) -> None:
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
        waits.steps.append(steps)
        waits.seconds.append(time.perf_counter() - begun)

    def _hear(self, event: Event) -> None:
        self.started |= isinstance(event, Started)
        self.done |= isinstance(event, Finished)


def _length(served: Served) -> Sampling:
    return Sampling(served.shape.answer)
