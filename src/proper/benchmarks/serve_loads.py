"""Load generators of `proper bench serve`: closed loop (all requests at once) and open loop (random arrivals).

Every token of every request gets a timestamp.
"""

from __future__ import annotations

import random
import time
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig, StoppingCriteria, StoppingCriteriaList

from proper.adapters.slot_cache import CacheCounts
from proper.benchmarks.serve_people import Served
from proper.benchmarks.timing import TimedSide
from proper.errors import ProperError
from proper.inference.engine import Engine
from proper.inference.engine_thread import EngineThread
from proper.inference.forward import pad_left
from proper.inference.requests import EngineLimits, Event, Request, Sink, Token
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
        people, others = served.names[:rows], served.names[rows : 2 * rows]
        one = people[:1] * rows
        sides = {
            "base": self._by_engine("base", people, people, bare=True),
            "one": self._by_engine("one", one, one),
            "mixed": self._by_engine("mixed", people, people),
            "crowd": self._by_engine("crowd", people, others),
            "plain": self._by_engine("plain", people, people, experts=False),
            "peft": self._by_generate("peft", served.peft, [range(rows)], adapter_names=people),
            "generate": self._by_generate("generate", served.bare, [range(rows)]),
            "loop": self._by_generate("loop", served.bare, [[at] for at in range(min(self._alone, rows))]),
        }
        self.times = {name: [] for name in sides}
        return sides

    def counts(self) -> CacheCounts:
        """Return the slot cache counters of the current engine."""
        return self._engine.stats().adapters

    def _by_engine(
        self, name: str, who: Sequence[str], before: Sequence[str], *, experts: bool = True, bare: bool = False
    ) -> TimedSide:
        """Return a side that runs the engine for the users `who`, after it has answered `before`."""
        served, rows = self.served, self.served.shape.rows

        def prepare(_: int) -> None:
            self._engine.close()
            served.mix(experts)
            self._engine = Engine(
                served.alone if bare else served.personal,
                EngineLimits(rows, slots=rows, prefill=1 << 30, prefix_bytes=0),
            )
            _answer(self._engine, [(5,)] * rows, before, 1, [])

        def work(at: int) -> None:
            found: Times = []
            _answer(self._engine, served.prompts, who, served.shape.answer, found)
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
    people = served.names
    engine = Engine(served.personal, EngineLimits(rows=rows, slots=slots, prefix_bytes=0))
    _answer(engine, [(5,)] * len(people), people, 1, [])
    runner = EngineThread(engine)
    runner.start()
    draw, due, times = random.Random(seed), 0.0, Times()
    begun = time.perf_counter()
    for at in range(arrivals):
        due += draw.expovariate(rate)
        time.sleep(max(0.0, begun + due - time.perf_counter()))
        prompt = served.prompts[at % len(served.prompts)]
        request = Request(prompt, draw.choice(people), sampling=Sampling(served.shape.answer))
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


def _answer(engine: Engine, prompts: Sequence[tuple[int, ...]], who: Sequence[str], length: int, times: Times) -> None:
    """Answer all requests on this thread; `times` receives the token times of each."""
    begun = time.perf_counter()
    for prompt, user in zip(prompts, who, strict=True):
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
