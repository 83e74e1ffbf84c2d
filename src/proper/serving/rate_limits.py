"""Rate limits: open prompts in all and by key, and a token bucket of requests per minute by key."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from proper.serving.errors import APIError

_BUCKETS = 10_000


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
        self._open: Counter[str] = Counter()
        self._visits: Counter[str] = Counter()
        self._buckets: dict[str, tuple[float, float]] = {}

    @contextmanager
    def enter(self, key: str, prompts: int) -> Iterator[None]:
        """Count `prompts` prompts of a key as open inside the block.

        Raises:
            APIError: 429; too many prompts are open.
        """
        if self._open.total() + prompts > self.limits.open_requests:
            raise _too_many("the server is full", 1.0)
        if self._open[key] + prompts > self.limits.open_per_key:
            raise _too_many(f"this key may have {self.limits.open_per_key} prompts open at once", 1.0)
        self._open[key] += prompts
        try:
            yield
        finally:
            self._open[key] -= prompts

    @contextmanager
    def visit(self, key: str) -> Iterator[None]:
        """Count one request towards the rate of a key, and as open inside the block.

        Raises:
            APIError: 429; too many requests came within a minute, or are open.
        """
        self.count(key)
        if self._visits[key] >= self.limits.open_per_key:
            raise _too_many(f"this key may have {self.limits.open_per_key} requests open at once", 1.0)
        self._visits[key] += 1
        try:
            yield
        finally:
            self._visits[key] -= 1
            if not self._visits[key]:
                del self._visits[key]

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
            raise _too_many(f"this key may ask {self.limits.per_minute} times a minute", (1 - left) * 60 / size)
        self._buckets[key] = (left - 1, now)
        if len(self._buckets) > _BUCKETS:  # drop buckets that are full again
            self._buckets = {name: pair for name, pair in self._buckets.items() if now - pair[1] < 60}


def _too_many(why: str, seconds: float) -> APIError:
    return APIError(429, f"{why}; try again later", code="rate_limited", headers={"Retry-After": str(int(seconds) + 1)})
