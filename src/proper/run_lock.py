"""One process at a time changes a run folder: a lock that the kernel gives back when its holder dies.

Knows nothing about what is done under it.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from proper.errors import RunFolderError
from proper.files import locked, make_folder

LOCK = "run.lock"
"""The file in the run folder; it holds the process id of whoever holds its lock."""


@contextmanager
def exclusive(folder: Path) -> Iterator[None]:
    """Be the only process that trains, evaluates or reports in a run folder, made if it is not there.

    Raises:
        RunFolderError: another process does so, whose id is named; or the folder cannot be written.
    """
    # All processes of one `accelerate launch` work together; the first of them holds the lock.
    if os.environ.get("RANK", "0") != "0":
        yield
        return
    with ExitStack() as stack:
        try:
            make_folder(folder)
            held = stack.enter_context(locked(folder / LOCK, wait=False))
            if held is not None:
                os.ftruncate(held, 0)
                os.pwrite(held, f"{os.getpid()}\n".encode(), 0)
        except OSError as error:
            raise RunFolderError(f"{folder}: cannot be written: {error.strerror or error}") from error
        if held is None:
            pid = (folder / LOCK).read_text(encoding="utf-8").strip() or "unknown"
            raise RunFolderError(f"{folder}: another process works in it (pid {pid}); wait for it, or stop it")
        yield
