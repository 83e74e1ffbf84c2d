"""Download of the LaMP benchmark: file addresses on the benchmark's site, license text, and fetching of a task.

This package neither contains nor redistributes any data of the benchmark.
"""

from __future__ import annotations

import logging
from contextlib import ExitStack
from pathlib import Path
from typing import Literal

from proper.console import Advance, progress
from proper.data.public.download import download
from proper.errors import InputError
from proper.lamp_tasks import LAMP_TASKS, LampTask, lamp_name

logger = logging.getLogger(__name__)

SITE = "https://ciir.cs.umass.edu/downloads/LaMP"
"""Address that the benchmark's download page (https://lamp-benchmark.github.io/download) links to."""

LICENSE = """\
LaMP (Salemi, Mysore, Bendersky and Zamani, ACL 2024; https://lamp-benchmark.github.io) is licensed CC BY-NC-SA 4.0
(https://creativecommons.org/licenses/by-nc-sa/4.0/): attribution, no commercial use, the same license for what is made
from it. The data sets that it is built on have licenses of their own, which hold too. The files go from the benchmark's
site to this machine; proper does not pass them on."""

Split = Literal["user", "time"]

_PARTS = tuple(f"{part}_{what}.json" for part in ("train", "dev") for what in ("questions", "outputs"))
_KIB = 1024


def fetchable_task(name: str) -> LampTask:
    """Return the task called `name`, in any spelling ("lamp-3", "LaMP_3").

    Raises:
        InputError: the task is unknown, or its data is not public.
    """
    task = LAMP_TASKS.get(lamp_name(name))
    public = ", ".join(known for known in LAMP_TASKS if known != "lamp-6")
    if task is None:
        raise InputError(f"no data set '{name}'; known: {public}")
    if task.name == "lamp-6":
        raise InputError("lamp-6: needs the Avocado mails (LDC2015T03), which are not public")
    return task


def file_urls(task: LampTask, split: Split, site: str = SITE) -> dict[str, str]:
    """Return the URL of each file by file name: train and dev, questions and outputs."""
    base = "/".join([site.rstrip("/"), *(["time"] if split == "time" else []), task.site])
    return {name: f"{base}/{name.partition('_')[0]}/{name}" for name in _PARTS}


def fetch_task(task: LampTask, split: Split, folder: Path, site: str = SITE) -> None:
    """Download a task's four files into `folder`; files that already exist are verified and kept.

    Raises:
        InputError: `site` is not a web address, or a different file of that name exists.
        ProperError: a file cannot be downloaded.
    """
    if not site.startswith(("https://", "http://")):
        raise InputError(f"--site {site}: not a web address (https://...)")
    for name, url in file_urls(task, split, site).items():
        if not _fetch(url, folder / name):
            logger.info(f"{folder / name}: is there, and as it was fetched")


def _fetch(url: str, path: Path) -> bool:
    done = 0
    advance: Advance = _unseen
    with ExitStack() as stack:

        def advanced(more: int) -> None:
            nonlocal done
            before, done = done // _KIB, done + more
            advance(done // _KIB - before)

        def started(total: int | None, held: int) -> None:
            # The total size is known only from the server's response.
            nonlocal advance
            units = None if total is None else total // _KIB
            advance = stack.enter_context(progress(f"fetch {path.name}, KiB", units))
            advanced(held)

        return download(url, path, started, advanced)


def _unseen(n: int = 1, note: str = "") -> None:
    """Do nothing; the placeholder before the progress bar exists."""
