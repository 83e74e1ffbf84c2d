"""Messages and progress bars on stderr, so that stdout has results only; also silences the logging of libraries.

On a terminal, progress is a live bar; elsewhere it is a plain line every few seconds.
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

Advance = Callable[..., None]
"""`advance(n=1, note="")`: n more units are done; the note (a loss, say) is shown beside the count until the next."""


class Bar(Protocol):
    """Type of a progress display: `progress` shows one, `no_bar` shows nothing."""

    def __call__(self, title: str, total: int | None, /) -> AbstractContextManager[Advance]: ...  # noqa: D102


def say(message: str) -> None:
    """Print one message on stderr, above a live progress bar if there is one."""
    print(message, file=sys.stderr, flush=True)


@contextmanager
def progress(title: str, total: int | None) -> Iterator[Advance]:
    """Show the progress of a piece of work; yields `advance(n=1, note="")`.

    Args:
        title: what is being done, in a few words.
        total: number of units; None if unknown.
    """
    shown = _bar(title, total) if sys.stderr.isatty() else _lines(title, total)
    with shown as advance:
        yield advance


@contextmanager
def no_bar(title: str, total: int | None) -> Iterator[Advance]:
    """Show no progress, for work that is a part of a larger piece with a progress bar."""
    yield lambda n=1, note="": None


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


@contextmanager
def _bar(title: str, total: int | None) -> Iterator[Advance]:
    # rich is imported here because most commands never show a bar.
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )

    columns = (
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[note]}", markup=False),
    )
    with Progress(*columns, console=Console(stderr=True), redirect_stdout=False) as bars:
        task = bars.add_task(title, total=total, note="")

        def advance(n: int = 1, note: str = "") -> None:
            bars.update(task, advance=n)
            if note:
                bars.update(task, note=note)

        yield advance


@contextmanager
def _lines(title: str, total: int | None) -> Iterator[Advance]:
    start = time.monotonic()
    done, latest, printed_at = 0, "", start
    of = "" if total is None else f"/{total}"

    def line() -> str:
        seconds = f"{time.monotonic() - start:.0f} s"
        return f"{title}: {done}{of}, {seconds}{', ' + latest if latest else ''}"

    def advance(n: int = 1, note: str = "") -> None:
        nonlocal done, latest, printed_at
        done, latest = done + n, note or latest
        now = time.monotonic()
        if now - printed_at >= _SECONDS_BETWEEN_LINES:
            say(line())
            printed_at = now

    yield advance
    # Printed only on success: after an error, a last progress line would read as if the work was finished.
    say(line())
