"""Record of requests, replies and faults from all threads. It checks nothing."""

from __future__ import annotations

import threading
import time
from collections import Counter
from dataclasses import dataclass, field


@dataclass(frozen=True)
class Answer:
    """An answer, or the beginning of one.

    Attributes:
        length: tokens that were asked for.
        whole: whether it came to its end.
        asked, ended: seconds since the beginning of the soak.
    """

    user: str | None
    length: int
    text: str
    tier: str
    version: int | None
    fallback: str | None
    whole: bool
    asked: float
    ended: float


@dataclass(frozen=True)
class Damage:
    """The time in which a user's adapter was damaged; `until` is None while it is."""

    user: str
    since: float
    until: float | None = None


@dataclass
class Ledger:
    """Records of all threads.

    Attributes:
        sent: interactions by user and id, with their target; noted before they are sent.
        acknowledged: those of them whose receipt was confirmed.
        deleted: users whose deletion was confirmed, and those for whom it was asked; where the id of one has a "-",
            what follows the last is in no other user's id or texts.
        guests: users who came in the meantime, with their words.
        replies: how often each route gave each reply.
        wrong: failures.
        done: faults, with their times.
    """

    sent: dict[tuple[str, str], str] = field(default_factory=dict)
    acknowledged: set[tuple[str, str]] = field(default_factory=set)
    deleted: set[str] = field(default_factory=set)
    guests: dict[str, str] = field(default_factory=dict)
    answers: list[Answer] = field(default_factory=list)
    damages: list[Damage] = field(default_factory=list)
    replies: Counter[str] = field(default_factory=Counter)
    wrong: list[str] = field(default_factory=list)
    done: list[tuple[float, str]] = field(default_factory=list)
    begun: float = field(default_factory=time.monotonic)
    _lock: threading.Lock = field(default_factory=threading.Lock)

    @property
    def now(self) -> float:
        """Seconds since the beginning."""
        return time.monotonic() - self.begun

    def reply(self, what: str) -> None:
        """Count a reply, or that there was none."""
        with self._lock:
            self.replies[what] += 1

    def amiss(self, what: str) -> None:
        """Record a failure."""
        with self._lock:
            self.wrong.append(f"{self.now:.2f} s: {what}")

    def fault(self, what: str) -> None:
        """Record a fault that was caused."""
        with self._lock:
            self.done.append((self.now, what))
