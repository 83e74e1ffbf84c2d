"""Exclusive lock of a run folder for training, evaluation and reports; the kernel releases it when its holder dies."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from proper.errors import ProperError, RunFolderError
from proper.files import close_to_others, is_full, locked, make_folder
from proper.run_folder import RunFolder


def is_first_process() -> bool:
    """Return whether this process holds the lock: all processes of an `accelerate launch` share it, rank 0 takes it."""
    return os.environ.get("RANK", "0") == "0"


@contextmanager
def exclusive(folder: Path) -> Iterator[None]:
    """Hold the lock of a run folder inside the block; the folder is created if it does not exist, and closed to others.

    The lock file contains the process id of the holder.

    Raises:
        RunFolderError: another process holds the lock, the message names its id; or the folder cannot be written.
        ProperError: the disk is full.
    """
    if not is_first_process():
        yield
        return
    with ExitStack() as stack:
        try:
            make_folder(folder)
            lock = stack.enter_context(locked(RunFolder(folder).lock, patience=0))
            if lock is not None:
                close_to_others(folder)
                os.ftruncate(lock, 0)
                os.pwrite(lock, f"{os.getpid()}\n".encode(), 0)
        except OSError as error:
            kind = ProperError if is_full(error) else RunFolderError
            raise kind(f"{folder}: cannot be written: {error.strerror or error}") from error
        if lock is None:
            pid = (RunFolder(folder).lock).read_text(encoding="utf-8").strip() or "unknown"
            raise RunFolderError(f"{folder}: another process works in it (pid {pid}); wait for it, or stop it")
        yield
