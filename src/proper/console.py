"""What a person watching sees: messages and progress, always on stderr, so that stdout holds results only.

On a terminal progress is a live bar; anywhere else it is a plain line now and then. Knows nothing about what is
being done.
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
"""`advance(n=1, note="")`: n more units are done; a note (a loss, say) stands beside the count until the next one."""


class Bar(Protocol):
    """Shows how far a piece of work is; `progress` does, `no_bar` does not."""

    def __call__(self, title: str, total: int | None, /) -> AbstractContextManager[Advance]: ...  # noqa: D102


def say(message: str) -> None:
    """Print one message on stderr. It stays above a live bar."""
    print(message, file=sys.stderr, flush=True)


@contextmanager
def progress(title: str, total: int | None) -> Iterator[Advance]:
    """Show how far a piece of work is; yields `advance(n=1, note="")`.

    Args:
        title: what is being done, a few words.
        total: how many units there are; None where nobody knows.
    """
    shown = _bar(title, total) if sys.stderr.isatty() else _lines(title, total)
    with shown as advance:
        yield advance


@contextmanager
def no_bar(title: str, total: int | None) -> Iterator[Advance]:
    """Show nothing, for work that is shown as a part of something larger."""
    yield lambda n=1, note="": None


def quiet_libraries() -> None:
    """Switch off the progress bars and advice of transformers, datasets and the hub, errors excepted.

    Works before they are imported and after; whoever set one of their environment variables keeps the last word.
    """
    for name, value in {
        "TRANSFORMERS_VERBOSITY": "error",
        "DATASETS_VERBOSITY": "error",
        "HF_HUB_VERBOSITY": "error",
        "HF_HUB_DISABLE_PROGRESS_BARS": "1",
        "HF_DATASETS_DISABLE_PROGRESS_BARS": "1",
    }.items():
        os.environ.setdefault(name, value)
    # PEFT still asks transformers for a name that is being renamed; that is between the two of them.
    warnings.filterwarnings("ignore", message="`is_gradient_checkpointing` is deprecated", category=FutureWarning)
    # torchao, where it is installed, complains on import about kernels that a CPU has no use for.
    for name in ("torchao", "torch.utils._pytree"):
        logging.getLogger(name).setLevel(logging.ERROR)
    # The variables are read on import: a library that is already there has to be told.
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
    # Only work that came to its end says so: an error's own message must not follow a line that reads as success.
    say(line())
