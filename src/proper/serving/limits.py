"""Limits by API key: open prompts and requests, requests per minute (token bucket), threads for blocking work."""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass
from typing import TypeVar

from anyio import CapacityLimiter, to_thread

from proper.serving.errors import APIError

_BUCKETS = 10_000  # token buckets from which on full ones are dropped


@dataclass(frozen=True)
class ServeLimits:
    """Limits on requests.

    Attributes:
        body_bytes: size of the largest request body.
        open_requests: most prompts that run or wait, over all keys.
        open_per_key: most prompts that run or wait, and most open requests of any kind, of one key.
        per_minute: requests per minute of one key on any route, refused ones included, and of one address without a
            valid key; also the burst size. None for no limit.
        stalled_seconds: how long a client may leave a piece of a stream unread before its request is cancelled.
    """

    body_bytes: int = 1 << 20
    open_requests: int = 1024
    open_per_key: int = 256
    per_minute: int | None = None
    stalled_seconds: float = 60.0


class RateLimiter:
    """Counts open prompts, open requests and the request rate by key. Not thread-safe."""

    def __init__(self, limits: ServeLimits, clock: Callable[[], float] = time.monotonic) -> None:
        self.limits = limits
        self._clock = clock
        self._open_prompts: Counter[str] = Counter()
        self._open_requests: Counter[str] = Counter()
        self._buckets: dict[str, tuple[float, float]] = {}
        self._max_buckets = _BUCKETS

    @contextmanager
    def enter(self, key: str, prompts: int) -> Iterator[None]:
        """Count `prompts` prompts of a key as open inside the block.

        Raises:
            APIError: 429; too many prompts are open.
        """
        if self._open_prompts.total() + prompts > self.limits.open_requests:
            raise _too_many("too many prompts are open", 1.0)
        if self._open_prompts[key] + prompts > self.limits.open_per_key:
            raise _too_many(f"this key may have {self.limits.open_per_key} prompts open at once", 1.0)
        self._open_prompts[key] += prompts
        try:
            yield
        finally:
            self._open_prompts[key] -= prompts
            if not self._open_prompts[key]:
                del self._open_prompts[key]

    @contextmanager
    def visit(self, key: str) -> Iterator[None]:
        """Count one request towards the rate of a key, and as open inside the block.

        Raises:
            APIError: 429; too many requests came within a minute, or are open.
        """
        self.count(key)
        if self._open_requests[key] >= self.limits.open_per_key:
            raise _too_many(f"this key may have {self.limits.open_per_key} requests open at once", 1.0)
        self._open_requests[key] += 1
        try:
            yield
        finally:
            self._open_requests[key] -= 1
            if not self._open_requests[key]:
                del self._open_requests[key]

    def count(self, key: str) -> None:
        """Count one request towards the rate of a key.

        Raises:
            APIError: 429; too many requests came within a minute.
        """
        if self.limits.per_minute is None:
            return
        size, now = float(self.limits.per_minute), self._clock()
        left, since = self._buckets.get(key, (size, now))
        left = min(size, left + (now - since) * size / 60)
        if left < 1:
            raise _too_many(f"this key may send {self.limits.per_minute} requests a minute", (1 - left) * 60 / size)
        self._buckets[key] = (left - 1, now)
        if len(self._buckets) > self._max_buckets:  # drop buckets that are full again
            self._buckets = {name: pair for name, pair in self._buckets.items() if now - pair[1] < 60}
            # Not again for each of the next requests, where none is full yet.
            self._max_buckets = max(_BUCKETS, 2 * len(self._buckets))


def _too_many(why: str, seconds: float) -> APIError:
    return APIError(429, f"{why}; try again later", code="rate_limited", headers={"Retry-After": str(int(seconds) + 1)})


T = TypeVar("T")


class LimitedThreads:
    """Runs work on at most `count` threads; for one event loop at a time."""

    def __init__(self, count: int) -> None:
        self._limiter, self._share_size = CapacityLimiter(count), max(1, count // 2)
        self._shares: dict[str, tuple[asyncio.Semaphore, int]] = {}

    async def run(self, key: str, work: Callable[[], T]) -> T:
        """Return what `work` returns; wait while the key's share, or all, of the threads are busy."""
        async with self._share_of(key):
            return await to_thread.run_sync(work, limiter=self._limiter)

    @asynccontextmanager
    async def _share_of(self, key: str) -> AsyncIterator[None]:
        share, waiting = self._shares.get(key, (asyncio.Semaphore(self._share_size), 0))
        self._shares[key] = share, waiting + 1
        try:
            async with share:
                yield
        finally:
            share, waiting = self._shares.pop(key)
            if waiting > 1:
                self._shares[key] = share, waiting - 1
