"""Bounded thread pool for work that would block the event loop; one key gets at most half of the threads."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import TypeVar

from anyio import CapacityLimiter, to_thread

T = TypeVar("T")


class LimitedThreads:
    """Runs work on at most `count` threads; for one event loop at a time."""

    def __init__(self, count: int) -> None:
        self._limiter, self._share = CapacityLimiter(count), max(1, count // 2)
        self._turns: dict[str, tuple[asyncio.Semaphore, int]] = {}

    async def run(self, key: str, work: Callable[[], T]) -> T:
        """Return what `work` returns; wait while the key's share, or all, of the threads are busy."""
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
