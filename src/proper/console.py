"""Log handler and progress bars of the command line, on stderr so that stdout has results only; quiets libraries.

The package logs to `proper.*` and prints nothing. `terminal_logging` shows these messages on stderr; only the command
line calls it. `progress` shows a live bar if the command line runs on a terminal, and logs a line every few seconds
elsewhere. It shows nothing where the logger `proper` has no level INFO, as in a program that did not configure logging.
"""

from __future__ import annotations

import logging
import os
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Protocol

_SECONDS_BETWEEN_LINES = 5.0

_PACKAGE = logging.getLogger("proper")
logger = logging.getLogger(__name__)

Advance = Callable[..., None]
"""`advance(n=1, note="", share=None)`: n more units are done; the note (a loss, say) is shown until the next.

`share` is the share of all work that is done, for the time left, where it is known better than from the units.
"""


def no_advance(n: int = 1, note: str = "", share: float | None = None) -> None:
    """Show nothing: the default of functions that say how far they are."""


class Bar(Protocol):
    """Type of a progress display: `progress` shows one, `no_bar` shows nothing."""

    def __call__(self, title: str, total: int | None, /) -> AbstractContextManager[Advance]: ...  # noqa: D102


class StderrHandler(logging.Handler):
    """Log handler that writes each message as plain text to the stderr of the moment."""

    def emit(self, record: logging.LogRecord) -> None:
        """Write one message, without level, time or logger name."""
        try:
            print(self.format(record), file=sys.stderr, flush=True)
        except Exception:
            self.handleError(record)


@contextmanager
def terminal_logging() -> Iterator[None]:
    """Show the package's messages of level INFO and above on stderr, and progress, within the block."""
    with _logging_to(StderrHandler(), logging.INFO):
        yield


@contextmanager
def silent() -> Iterator[None]:
    """Show neither messages nor progress within the block."""
    with _logging_to(logging.NullHandler(), logging.CRITICAL + 1):
        yield


@contextmanager
def _logging_to(handler: logging.Handler, level: int) -> Iterator[None]:
    """Make `handler` the only one of the package's loggers within the block."""
    before = _PACKAGE.handlers, _PACKAGE.level, _PACKAGE.propagate
    # Nothing is passed on to the root logger: a library that configures it would show every message twice.
    _PACKAGE.handlers, _PACKAGE.propagate = [handler], False
    _PACKAGE.setLevel(level)
    try:
        yield
    finally:
        _PACKAGE.handlers, _, _PACKAGE.propagate = before
        _PACKAGE.setLevel(before[1])


@contextmanager
def progress(title: str, total: int | None) -> Iterator[Advance]:
    """Show the progress of a piece of work, if messages are shown; yields an `Advance`.

    Args:
        title: what is being done, in a few words.
        total: number of units; None if unknown.
    """
    if not _PACKAGE.isEnabledFor(logging.INFO):
        shown = no_bar
    elif sys.stderr.isatty() and any(isinstance(each, StderrHandler) for each in _PACKAGE.handlers):
        shown = _bar
    else:
        shown = _lines
    with shown(title, total) as advance:
        yield advance


@contextmanager
def no_bar(title: str, total: int | None) -> Iterator[Advance]:
    """Show no progress, for work that is a part of a larger piece with a progress bar."""
    yield no_advance


def quiet_libraries() -> None:
    """Switch off progress bars and messages below errors of transformers, datasets and huggingface_hub.

    It works before and after they are imported. Environment variables that the user has set take precedence.
    """
    for name, value in {
        "TRANSFORMERS_VERBOSITY": "error",
        "DATASETS_VERBOSITY": "error",
        "HF_HUB_VERBOSITY": "error",
        "HF_HUB_DISABLE_PROGRESS_BARS": "1",
        "HF_DATASETS_DISABLE_PROGRESS_BARS": "1",
        "TQDM_DISABLE": "1",  # transformers has bars of tqdm that its own switch does not reach
    }.items():
        os.environ.setdefault(name, value)
    # PEFT uses an attribute that transformers deprecates; users of this package cannot change that.
    warnings.filterwarnings("ignore", message="`is_gradient_checkpointing` is deprecated", category=FutureWarning)
    # torchao, if installed, warns on import about kernels that are irrelevant on a CPU.
    for name in ("torchao", "torch.utils._pytree"):
        logging.getLogger(name).setLevel(logging.ERROR)
    # The variables are read on import: a library that is imported already is configured through its functions.
    if "huggingface_hub.utils" in sys.modules and os.environ["HF_HUB_DISABLE_PROGRESS_BARS"] == "1":
        sys.modules["huggingface_hub.utils"].disable_progress_bars()
    if "transformers.utils.logging" in sys.modules and os.environ["TRANSFORMERS_VERBOSITY"] == "error":
        sys.modules["transformers.utils.logging"].set_verbosity_error()
        sys.modules["transformers.utils.logging"].disable_progress_bar()
    if "datasets.utils" in sys.modules and os.environ["HF_DATASETS_DISABLE_PROGRESS_BARS"] == "1":
        sys.modules["datasets.utils"].disable_progress_bars()


def spoken_time(seconds: float) -> str:
    """Return a time in the unit that suits it."""
    if seconds < 90:
        return f"{max(1, round(seconds))} s"
    return f"{round(seconds / 60)} min" if seconds < 90 * 60 else f"{seconds / 3600:.1f} h"


class _TimeLeft:
    """Units done, and the time left at the pace since the first call of `advance`.

    That call does not count: a resumed stage begins with all that was done before, and a first step warms up.
    """

    def __init__(self, total: int | None) -> None:
        self.total, self.done, self.share = total, 0, 0.0
        self._first: tuple[float, float] | None = None
        self._latest = 0.0

    def advance(self, n: int, share: float | None) -> None:
        """Count n more units, and the share of all work that is done: the units' by default."""
        self.done += n
        self.share = share if share is not None else self.done / self.total if self.total else 0.0
        self._latest = time.monotonic()
        if self._first is None and self.share:
            self._first = self._latest, self.share

    @property
    def left(self) -> float | None:
        """Seconds left; None before a pace is known."""
        if self._first is None or self._latest - self._first[0] < 1 or self.share <= self._first[1]:
            return None
        pace = (self.share - self._first[1]) / (self._latest - self._first[0])
        return max(0.0, (1 - self.share) / pace - (time.monotonic() - self._latest))

    @property
    def spoken(self) -> str:
        """The time left in words; empty if it is unknown or nothing is left."""
        return f"about {spoken_time(self.left)} left" if self.left is not None and self.share < 1 else ""


@contextmanager
def _bar(title: str, total: int | None) -> Iterator[Advance]:
    # rich is imported here because most commands never show a bar.
    from rich.console import Console
    from rich.highlighter import NullHighlighter
    from rich.logging import RichHandler
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeElapsedColumn,
    )

    columns = (
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("{task.fields[left]}", markup=False),
        TextColumn("{task.fields[note]}", markup=False),
    )
    console = Console(stderr=True)
    # While the bar is live, rich's handler writes messages above it.
    above = RichHandler(
        console=console, highlighter=NullHighlighter(), keywords=[], show_time=False, show_level=False, show_path=False
    )
    with (
        Progress(*columns, console=console, redirect_stdout=False) as bars,
        _logging_to(above, _PACKAGE.level),
    ):
        task, pace = bars.add_task(title, total=total, note="", left=""), _TimeLeft(total)

        def advance(n: int = 1, note: str = "", share: float | None = None) -> None:
            pace.advance(n, share)
            bars.update(task, advance=n, left=pace.spoken)
            if note:
                bars.update(task, note=note)

        yield advance


@contextmanager
def _lines(title: str, total: int | None) -> Iterator[Advance]:
    start = time.monotonic()
    pace, latest, printed, printed_at = _TimeLeft(total), "", "", start
    of = "" if total is None else f"/{total}"

    def line() -> str:
        parts = [f"{title}: {pace.done}{of}", f"{time.monotonic() - start:.0f} s", pace.spoken, latest]
        return ", ".join(part for part in parts if part)

    def advance(n: int = 1, note: str = "", share: float | None = None) -> None:
        nonlocal latest, printed, printed_at
        latest = note or latest
        pace.advance(n, share)
        now = time.monotonic()
        if now - printed_at >= _SECONDS_BETWEEN_LINES:
            printed, printed_at = line(), now
            logger.info(printed)

    yield advance
    # Printed only on success: after an error, a last progress line would read as if the work was finished.
    if line() != printed:
        logger.info(line())
