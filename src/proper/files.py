"""Files that are never half-written, and hashes of what is in them.

Below a run folder only files of its registry (`run_files`) are written. What is not whole yet lies in a hidden folder
beside its place, which its writer keeps locked: so `sweep` can tell what a killed process left there.
Knows nothing about what the files mean.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from proper.errors import ProperError
from proper.run_files import TEMPORARY, require_listed


@contextmanager
def atomic_path(path: Path) -> Iterator[Path]:
    """Yield a temporary path beside `path`; on success it replaces `path`, on failure it is removed.

    Raises:
        InputError: `path` lies in a run folder and is none of its files.
        ProperError: the disk is full or the folder cannot be written; `path` is as it was.
    """
    require_listed(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with _hidden_folder(path) as folder:
            temporary = folder / "new.tmp"
            temporary.touch()
            yield temporary
            with temporary.open("rb+") as file:
                os.fsync(file.fileno())
            temporary.chmod(0o644)
            os.replace(temporary, path)
    except OSError as error:
        raise ProperError(f"{path}: cannot be written: {error.strerror or error}") from error


@contextmanager
def atomic_folder(path: Path) -> Iterator[Path]:
    """Yield a temporary folder beside `path`; on success it becomes `path`, on failure it is removed.

    A folder that was there is put aside first and removed last; between the two renames neither is at `path`.

    Raises:
        InputError: `path` lies in a run folder.
        ProperError: the disk is full or the place cannot be written; `path` is as it was.
    """
    require_listed(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with _hidden_folder(path) as new, _hidden_folder(path) as old:
            yield new
            for file in new.rglob("*"):
                if file.is_file():
                    with file.open("rb+") as opened:
                        os.fsync(opened.fileno())
                    file.chmod(0o644)
            new.chmod(0o755)
            if path.exists():
                os.replace(path, old)
            os.replace(new, path)
    except OSError as error:
        raise ProperError(f"{path}: cannot be written: {error.strerror or error}") from error


def sweep(folder: Path) -> None:
    """Remove what killed processes left half-written in `folder` and below it; what a living one writes stays.

    Raises:
        OSError: something cannot be removed.
    """
    for place, folders, names in os.walk(folder):
        for name in [*folders, *names]:
            if fnmatchcase(name, TEMPORARY):
                _remove_dead(Path(place, name))
        # A store may have very many blobs, and none of them is written through here.
        folders[:] = [name for name in folders if name != "blobs" and not fnmatchcase(name, TEMPORARY)]


@contextmanager
def _hidden_folder(path: Path) -> Iterator[Path]:
    """Yield a new folder beside `path`, locked while this process lives; it is removed afterwards."""
    folder, handle = _locked_folder(path)
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        os.close(handle)


def _locked_folder(path: Path) -> tuple[Path, int]:
    while True:
        folder = Path(tempfile.mkdtemp(prefix=f".{path.name[:64]}.", suffix=".tmp", dir=path.parent))
        # The lock is the folder's: writers may replace the file in it.
        handle = os.open(folder, os.O_RDONLY)
        if _lock(handle) is not False and folder.exists():
            return folder, handle
        os.close(handle)  # another process swept it before it was locked


def _lock(handle: int) -> bool | None:
    """Lock an open file or folder; False where another process has it, None where the file system has no locks."""
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:
        return None
    return True


def _remove_dead(path: Path) -> None:
    if path.is_symlink():
        return  # nothing that is written here
    try:
        handle = os.open(path, os.O_RDONLY | os.O_NOFOLLOW)
    except FileNotFoundError:
        return
    try:
        if _lock(handle):
            if path.is_dir():
                shutil.rmtree(path)
            else:
                path.unlink()
    except FileNotFoundError:
        return  # its writer, or another process that sweeps, was faster
    finally:
        os.close(handle)


def write_text(path: Path, text: str) -> None:
    """Write `text` to `path` atomically."""
    with atomic_path(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_json(path: Path, value: Any) -> None:
    """Write `value` to `path` as indented JSON, atomically. NaN is an error: JSON has none."""
    text = json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False, sort_keys=False)
    write_text(path, text + "\n")


def read_json(path: Path) -> Any:
    """Read JSON from `path`.

    Raises:
        ProperError: the file is missing or is not JSON.
    """
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise ProperError(f"{path}: no such file") from error
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ProperError(f"{path}: not readable as JSON: {error}") from error


def hash_value(value: Any) -> str:
    """Return a short stable hash of a JSON-able value."""
    text = json.dumps(value, sort_keys=True, ensure_ascii=False, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def hash_file(path: Path) -> str:
    """Return the sha256 of a file's bytes, read in pieces."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while piece := file.read(1 << 20):
            digest.update(piece)
    return digest.hexdigest()
