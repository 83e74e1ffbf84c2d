"""Progress of a fit: callbacks that report its phase, to the fit queue and to a terminal, and stop a withdrawn fit."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from concurrent.futures import CancelledError
from contextlib import contextmanager

from proper.console import Advance, Bar
from proper.interactions.fit_queue import Claim, FitQueue

REPORT_SECONDS = 0.2
"""Interval in which a fit reports its progress and checks whether its user was deleted."""

ProgressCallback = Callable[[str, float], None]
"""Progress callback (phase, share of the fit that is done)."""


class WithdrawnError(CancelledError):
    """The user was deleted during the fit."""


def no_progress(phase: str, share: float) -> None:
    """Ignore progress; the default callback."""


def shares_of(phase: str, total: int, on_progress: ProgressCallback) -> Callable[[int], None]:
    """Return a callback for numbers of users done, which passes on the share of all users."""
    done = 0

    def advance(count: int) -> None:
        nonlocal done
        done += count
        on_progress(phase, done / max(1, total))

    return advance


def bar_of(on_progress: ProgressCallback) -> Bar:
    """Return a progress display that calls `on_progress` with its title, as the phase, and its share done."""

    @contextmanager
    def bar(title: str, total: int | None) -> Iterator[Advance]:
        def advance(n: int = 1, note: str = "", share: float | None = None) -> None:
            on_progress(title, 1.0 if share is None else share)

        yield advance

    return bar


def throttled(queue: FitQueue, claim: Claim, on_progress: ProgressCallback) -> ProgressCallback:
    """Return a callback that passes progress on to the queue and `on_progress`, at intervals of `REPORT_SECONDS`.

    It raises `WithdrawnError` if the user was deleted.
    """
    last, before = 0.0, ""

    def report(phase: str, share: float) -> None:
        nonlocal last, before
        now = time.monotonic()
        if phase == before and now - last < REPORT_SECONDS:
            return
        last, before = now, phase
        if not queue.advance(claim, round(min(share, 0.99), 3), phase):
            raise WithdrawnError
        on_progress(phase, share)

    return report
