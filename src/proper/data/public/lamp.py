"""Download of the LaMP benchmark: file addresses on the benchmark's site, license text, and fetching of a task.

This package neither contains nor redistributes any data of the benchmark.
"""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Literal

from proper.config.lamp_tasks import LAMP_TASKS, LampTask, lamp_name
from proper.data.public.download import fetch, require_json, require_web_address
from proper.errors import InputError

logger = logging.getLogger(__name__)

SITE = "https://ciir.cs.umass.edu/downloads/LaMP"
"""Address that the benchmark's download page (https://lamp-benchmark.github.io/download) links to."""

LICENSE = """\
LaMP (Salemi, Mysore, Bendersky and Zamani, ACL 2024; https://lamp-benchmark.github.io) is licensed CC BY-NC-SA 4.0
(https://creativecommons.org/licenses/by-nc-sa/4.0/): attribution, no commercial use, the same license for what is made
from it. The data sets that it is built on have licenses of their own, which hold too. The files go from the benchmark's
site to this machine; proper does not pass them on."""

TERMS = "CC BY-NC-SA 4.0"
"""The license in a few words."""

Split = Literal["user", "time"]

_PARTS = tuple(f"{part}_{what}.json" for part in ("train", "dev") for what in ("questions", "outputs"))


def fetchable_task(name: str) -> LampTask:
    """Return the task called `name`, in any spelling ("lamp-3", "LaMP_3").

    Raises:
        InputError: the task is unknown, or its data is not public.
    """
    task = LAMP_TASKS.get(lamp_name(name))
    if task is None:
        raise InputError(f"no data set '{name}'; `proper data list` shows their names")
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
    require_web_address("--site", site)
    for name, url in file_urls(task, split, site).items():
        if not fetch(url, folder / name, require_json):
            logger.info("%s: already fetched, and unchanged", folder / name)
