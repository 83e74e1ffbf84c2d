"""Client of `experiments.simulation`: starts the server as a process and streams answers from it."""

from __future__ import annotations

import asyncio
import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import httpx


@dataclass(frozen=True)
class Timed:
    """One answer: seconds from the request to each of its tokens."""

    stamps: tuple[float, ...]

    @property
    def first(self) -> float:
        """Seconds to the first token."""
        return self.stamps[0]


class Client:
    """Streams answers of the server at `url`; `users` has the users of all requests so far."""

    def __init__(self, url: str, http: httpx.AsyncClient) -> None:
        self.url, self.http, self.begun = url, http, time.perf_counter()
        self.users: list[int] = []

    async def ask(self, user: int, prompt: int, answer: int, due: float | None = None) -> Timed:
        """Send one request, at `due` if it is given; waiting counts from then."""
        if due is not None:
            await asyncio.sleep(max(0.0, due - self.now()))
        since = self.now() if due is None else due
        body = {
            "model": "served",
            "user": f"u{user - 1}",
            "prompt": [3 + (7 * user + at) % 4000 for at in range(prompt)],
            "max_tokens": answer,
            "stream": True,
            "proper": {"gates": True},
        }
        stamps: list[float] = []
        async with self.http.stream("POST", f"{self.url}/v1/completions", json=body, timeout=600) as reply:
            reply.raise_for_status()
            async for line in reply.aiter_lines():
                if line.startswith("data: {"):
                    stamps += [self.now() - since] * len(json.loads(line[6:]).get("proper", {}).get("gates") or ())
        if len(stamps) != answer:
            raise RuntimeError(f"{answer} tokens asked for, {len(stamps)} chunks came")
        self.users.append(user)
        return Timed(tuple(stamps))

    def now(self) -> float:
        """Return the seconds since the client began."""
        return time.perf_counter() - self.begun

    async def metrics(self) -> dict[str, float]:
        """Return the sums of the server's metrics by name, over all labels."""
        found: dict[str, float] = {}
        for line in (await self.http.get(f"{self.url}/metrics", timeout=600)).text.splitlines():
            name, _, value = line.partition(" ") if "{" not in line else (line[: line.index("{")], "", line.split()[-1])
            if not line.startswith("#"):
                found[name] = found.get(name, 0.0) + float(value)
        return found


@contextmanager
def running_server(folder: Path, pad: float) -> Iterator[str]:
    """Run the server in a process of its own; yields its address."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "experiments.simulation_server", str(folder), str(port), str(pad)]
    process = subprocess.Popen(command, env={**os.environ, "OMP_NUM_THREADS": "1"})
    url = f"http://127.0.0.1:{port}"
    try:
        while not _answers(url):
            if process.poll() is not None:
                raise RuntimeError("the server did not start")
            time.sleep(0.5)
        yield url
    finally:
        process.terminate()
        process.wait()


def _answers(url: str) -> bool:
    try:
        return httpx.get(f"{url}/readyz", timeout=600).status_code == 200
    except httpx.TransportError:
        return False
