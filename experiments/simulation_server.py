"""The server of `experiments.simulation`: random adapters on proper-nano behind the real HTTP server.

python -m experiments.simulation_server FOLDER PORT PAD
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from proper.benchmarks.backbones import BenchBackbone
from proper.benchmarks.serve_setup import Served, ServedShape
from proper.inference.engine import Engine
from proper.inference.engine_thread import EngineThread
from proper.inference.requests import EngineLimits, Event, Finished, Request, Sink, Token
from proper.serving.app import ServeSettings, create_app
from proper.serving.keys import Keys
from proper.serving.server import free_port, make_server

USERS, ROWS, SLOTS = 48, 3, 8
MAX_PROMPT, MAX_ANSWER = 96, 16
PAD_TOKENS = 100
"""Padding of a prefill grows by the padding of a step with so many prompt tokens."""


@dataclass(frozen=True)
class Work:
    """A piece of the server's work: `kind` step, prefill, rest (of an engine step) or load.

    Attributes:
        size: rows of a step, prompt tokens of a prefill with padding to the longest, 0 of the others.
        seconds: how long it took.
    """

    kind: str
    size: int
    seconds: float


@dataclass(frozen=True)
class Reply:
    """A request as the engine saw it: user, numbers of tokens, and the times of arrival, first and last token."""

    user: int
    prompt: int
    answer: int
    arrival: float
    first: float
    last: float


def measure(engine: Any, log: Path, pad: float) -> None:
    """Let an engine log its work and its requests to a file, and take at least `pad` seconds for a step and a prefill.

    Padding emulates a slower backbone, whose time does not depend on other load on the machine.
    """
    batch, file = engine._batch, log.open("w", encoding="utf-8")
    step, decode, prefill, load = engine.step, batch.decode, batch.prefill, engine._adapters.cache._read
    submit = engine.submit
    busy = [0.0]

    def timed(kind: str, size: int, least: float, call: Callable[..., Any], *arguments: Any) -> Any:
        begun = time.perf_counter()
        result = call(*arguments)
        time.sleep(max(0.0, least - (time.perf_counter() - begun)))
        note(Work(kind, size, time.perf_counter() - begun))
        return result

    def note(entry: Work | Reply) -> None:
        if isinstance(entry, Work) and entry.kind in ("step", "prefill"):
            busy[0] += entry.seconds
        print(json.dumps(asdict(entry)), file=file, flush=True)

    def timed_step() -> None:
        begun, busy[0] = time.perf_counter(), 0.0
        step()
        if busy[0]:
            note(Work("rest", 0, time.perf_counter() - begun - busy[0]))

    def timed_prefill(handles: Any) -> Any:
        size = len(handles) * max(handle.size for handle in handles)
        return timed("prefill", size, pad * (1 + size / PAD_TOKENS), prefill, handles)

    def timed_submit(request: Request, sink: Sink) -> Any:
        arrival, stamps = time.monotonic(), list[float]()

        def hear(event: Event) -> None:
            if isinstance(event, Token):
                stamps.append(time.monotonic())
            elif isinstance(event, Finished) and stamps:
                user = int((request.user or "u0")[1:]) + 1
                note(Reply(user, len(request.prompt), len(stamps), arrival, stamps[0], stamps[-1]))
            sink(event)

        return submit(request, hear)

    engine.submit = timed_submit
    engine.step = timed_step
    batch.decode = lambda: timed("step", len(batch), pad, decode)
    batch.prefill = timed_prefill
    engine._adapters.cache._read = lambda *arguments: timed("load", 0, 0.0, load, *arguments)


def read_log(log: Path, start: int = 0) -> tuple[list[Work], list[Reply], int]:
    """Return the logged work and the requests in order of arrival from line `start` on, and the number of lines."""
    lines = log.read_text(encoding="utf-8").splitlines()
    entries = [json.loads(line) for line in lines[start:]]
    work = [Work(**entry) for entry in entries if "kind" in entry]
    replies = [Reply(**entry) for entry in entries if "kind" not in entry]
    return work, sorted(replies, key=lambda reply: reply.arrival), len(lines)


def serve(folder: Path, port: int, pad: float) -> None:
    """Serve until the process is terminated; the work is logged to FOLDER/work.jsonl."""
    device, backbone = torch.device("cpu"), BenchBackbone()
    shape = ServedShape(backbone, "all", torch.float32, USERS, 1, MAX_PROMPT, MAX_ANSWER)
    served = Served(shape, backbone.load(torch.float32, device), device, folder)
    engine = Engine(served.personal, EngineLimits(ROWS, SLOTS, prefix_bytes=0))
    measure(engine, folder / "work.jsonl", pad)
    app = create_app(EngineThread(engine), Keys(folder / "keys.json"), ServeSettings("served"), lambda line: None)
    with free_port("127.0.0.1", port) as bound:
        make_server(app, 5).run([bound])


if __name__ == "__main__":
    serve(Path(sys.argv[1]), int(sys.argv[2]), float(sys.argv[3]))
