"""Records when Python opens, renames or removes an SQLite file that its process has open, or forks with one open.

POSIX locks belong to a process and a file: closing any descriptor of a file drops the locks of all of the process's
connections (https://sqlite.org/howtocorrupt.html, 2.2, 2.4 and 2.6). Files that SQLite itself opens cause no event.

Python imports this module at its start if its folder is in PYTHONPATH. Events are recorded, with their place in
`proper`, while the variable PROPER_DESCRIPTORS names a file.
"""

from __future__ import annotations

import os
import stat
import sys
from types import FrameType
from typing import Any, cast

NAME = "PROPER_DESCRIPTORS"
EVENTS = ("open", "os.remove", "os.rename", "os.link", "os.truncate", "os.fork")
KIND = ".sqlite"


def watch() -> None:
    """Record such events of this process from now on; cannot be undone."""
    sys.addaudithook(_hook)


def _hook(event: str, arguments: tuple[Any, ...]) -> None:
    report = os.environ.get(NAME)
    if event not in EVENTS or not report:
        return
    # A link never replaces a file, which another thread of this process may just have made.
    named = arguments[: 1 if event == "os.link" else 2]
    paths = [os.fsdecode(each) for each in named if isinstance(each, str | bytes | os.PathLike)]
    if event == "os.fork":
        found = [path for _, path in _descriptors() if KIND in path]
    else:
        found = [path for path in paths if KIND in path and _is_open(path)]
    if found and (places := _places()):
        file = os.open(report, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
        os.write(file, f"{event} {found[0]} at {' '.join(places)}\n".encode())
        os.close(file)


def _places() -> list[str]:
    """Return the innermost calls in the package."""
    found, frame = list[str](), cast("FrameType | None", sys._getframe(2))
    while frame is not None and len(found) < 3:
        if "/proper/" in frame.f_code.co_filename:
            found.append(f"{frame.f_code.co_filename}:{frame.f_lineno}")
        frame = frame.f_back
    return found


def _is_open(path: str) -> bool:
    try:
        wanted = os.stat(path)
    except OSError:
        return False
    # The folder of an unfinished file has the file's name in its own.
    return stat.S_ISREG(wanted.st_mode) and any(os.path.samestat(wanted, found) for found, _ in _descriptors())


def _descriptors() -> list[tuple[os.stat_result, str]]:
    found = []
    for number in os.listdir("/proc/self/fd"):
        try:
            found.append((os.stat(int(number)), os.readlink(f"/proc/self/fd/{number}")))
        except OSError:
            continue  # the descriptor of the listing itself
    return found


if __name__ == "sitecustomize":
    watch()
