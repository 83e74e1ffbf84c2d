"""Work that would hold up the event loop, on a bounded number of threads of which one key gets at most half.

Knows nothing about what the work is.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import TypeVar

from anyio import CapacityLimiter, to_thread

T = TypeVar("T")


class LimitedThreads:
    """Up to `count` threads at work; for one event loop at a time."""

    def __init__(self, count: int) -> None:
        self._limiter, self._share = CapacityLimiter(count), max(1, count // 2)
        self._turns: dict[str, tuple[asyncio.Semaphore, int]] = {}

    async def run(self, key: str, work: Callable[[], T]) -> T:
        """Return what `work` returns; it waits while as much work of the key, or of all, is being done."""
        async with self._turn(key):
            return await to_thread.run_sync(work, limiter=self._limiter)

    @asynccontextmanager
    async def _turn(self, key: str) -> AsyncIterator[None]:
        turn, users = self._turns.get(key, (asyncio.Semaphore(self._share), 0))
        self._turns[key] = turn, users + 1
        try:
            async with turn:
                yield
        finally:
            turn, users = self._turns.pop(key)
            if users > 1:
                self._turns[key] = turn, users - 1
