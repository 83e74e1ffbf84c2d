"""Atomic file and folder writes with private permissions, file locks, JSON files and content hashes.

Below a run folder only files of its registry (`run_folder`) can be written. An unfinished file lies in a hidden folder
beside its final path; its writer keeps that folder locked, so that `sweep` can recognize what a killed process left.
Files are private by default: 0600 for files, 0700 for folders, whatever the umask is.
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import json
import os
import re
import shutil
import sqlite3
import stat
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from proper.errors import ProperError
from proper.run_folder import TEMPORARY, require_listed

PRIVATE_FILE, PRIVATE_FOLDER = 0o600, 0o700
_OTHERS = 0o007
_PIECE = 1 << 20
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
# SQLite calls it an I/O error if there is no space for the index of a write-ahead log.
_SQLITE_FULL = (sqlite3.SQLITE_FULL, sqlite3.SQLITE_IOERR_SHMSIZE)
_OS_ERROR = re.compile(r"\(os error (\d+)\)")


def make_folder(path: Path, *, shared: bool = False) -> None:
    """Make a folder and the folders above it that are missing, for the owner only unless `shared`.

    An existing folder keeps its mode; call `close_to_others` for one with personal data.
    """
    missing = [each for each in (path, *path.parents) if not each.exists()]
    for each in reversed(missing):
        each.mkdir(0o777 if shared else PRIVATE_FOLDER, exist_ok=True)


def private_folder(path: Path) -> None:
    """Make a folder for the owner only; an existing one is closed to others (see `close_to_others`)."""
    make_folder(path)
    close_to_others(path)


def close_to_others(path: Path) -> None:
    """Remove the permissions of group and others from a file or folder that others may open; links are not followed.

    A mode that an operator opened to a group only (0640, 0750) is kept, and so is the mode of another owner's file.
    """
    found = path.lstat()
    if stat.S_ISLNK(found.st_mode) or not found.st_mode & _OTHERS or found.st_uid != os.geteuid():
        return
    path.chmod(stat.S_IMODE(found.st_mode) & 0o7700)


def open_private(path: Path, flags: int) -> int:
    """Open a file with `os.open`; a new file is private, an existing one opened for writing is closed to others.

    Raises:
        OSError: also if the path is a symbolic link, which is never followed.
    """
    try:
        file = os.open(path, flags | os.O_NOFOLLOW | os.O_CLOEXEC, PRIVATE_FILE)
    except OSError as error:
        if error.errno == errno.ELOOP:
            raise OSError(errno.ELOOP, "is a symbolic link and is not followed", str(path)) from error
        raise
    found = os.fstat(file)
    if found.st_mode & _OTHERS and found.st_uid == os.geteuid() and flags & os.O_ACCMODE != os.O_RDONLY:
        os.fchmod(file, stat.S_IMODE(found.st_mode) & 0o7700)
    return file


@contextmanager
def locked(path: Path, *, shared: bool = False, patience: float | None = None) -> Iterator[int | None]:
    """Hold a file's flock, which the kernel releases when the process dies; yields the open file descriptor.

    Args:
        path: the lock file; created if it does not exist.
        shared: hold it together with other shared holders, instead of alone.
        patience: seconds to wait for other holders; None waits as long as it takes. Yields None if it runs out.

    Raises:
        OSError: the file cannot be created or opened.
    """
    file = open_private(path, os.O_RDWR | os.O_CREAT)
    mode = fcntl.LOCK_SH if shared else fcntl.LOCK_EX
    try:
        if patience is None:
            fcntl.flock(file, mode)
            yield file
            return
        deadline = time.monotonic() + patience
        while not _try_lock(file, mode):
            if time.monotonic() >= deadline:
                yield None
                return
            time.sleep(0.02)
        yield file
    finally:
        os.close(file)


def _try_lock(file: int, mode: int) -> bool:
    try:
        fcntl.flock(file, mode | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


@contextmanager
def atomic_path(path: Path, *, shared: bool = False) -> Iterator[Path]:
    """Yield a temporary path beside `path`; on success it replaces `path`, on failure it is removed.

    Only the owner may read the file (0600), unless `shared`: then the umask decides.

    Raises:
        InputError: `path` lies in a run folder and is not in the registry.
        ProperError: the disk is full or the folder cannot be written; `path` is as it was.
    """
    require_listed(path)
    try:
        make_folder(path.parent, shared=shared)
        with hidden_folder(path) as folder:
            temporary = folder / "new.tmp"
            os.close(os.open(temporary, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o666 if shared else PRIVATE_FILE))
            mode = stat.S_IMODE(temporary.stat().st_mode)
            yield temporary
            with temporary.open("rb+") as file:
                os.fsync(file.fileno())
            # Some writers replace the file, which changes its mode.
            temporary.chmod(mode)
            os.replace(temporary, path)
    except (OSError, SafetensorError) as error:
        raise ProperError(f"{path}: cannot be written: {getattr(error, 'strerror', None) or error}") from error


@contextmanager
def atomic_folder(path: Path, *, shared: bool = False) -> Iterator[Path]:
    """Yield a temporary folder beside `path`; on success it becomes `path`, on failure it is removed.

    An existing folder is renamed away first and removed last; between the two renames `path` does not exist. Only the
    owner may open the folder and its files (0700, 0600), unless `shared`: then the umask decides.

    Raises:
        InputError: `path` lies in a run folder and is not in the registry.
        ProperError: the disk is full or the folder cannot be written; `path` is unchanged.
    """
    require_listed(path)
    try:
        make_folder(path.parent, shared=shared)
        with hidden_folder(path) as hidden:
            new = hidden / "new"
            new.mkdir(0o777 if shared else PRIVATE_FOLDER)
            yield new
            _settle(new)
            if path.exists():
                os.replace(path, hidden / "old")
            os.replace(new, path)
    except (OSError, SafetensorError) as error:
        raise ProperError(f"{path}: cannot be written: {getattr(error, 'strerror', None) or error}") from error


def _settle(folder: Path) -> None:
    """Sync all files of a folder to the disk and give them the folder's permissions."""
    mode = stat.S_IMODE(folder.stat().st_mode)
    for entry in folder.rglob("*"):
        if entry.is_file() and not entry.is_symlink():
            with entry.open("rb+") as opened:
                os.fsync(opened.fileno())
            entry.chmod(mode & 0o666)
        elif entry.is_dir() and not entry.is_symlink():
            entry.chmod(mode)


def is_full(error: BaseException | None) -> bool:
    """Return whether an error was caused by a full disk or quota, or by a limit on the size of files."""
    while error is not None:
        found = _OS_ERROR.search(str(error)) if isinstance(error, SafetensorError) else None
        number = int(found[1]) if found else getattr(error, "errno", None)
        if number in _FULL or getattr(error, "sqlite_errorcode", None) in _SQLITE_FULL:
            return True
        error = error.__cause__ or error.__context__
    return False


def wipe_file(path: Path) -> int:
    """Zero and remove a file; return its size, 0 if there is none."""
    try:
        file = open_private(path, os.O_WRONLY)
    except FileNotFoundError:
        return 0
    try:
        size = os.fstat(file).st_size
        for at in range(0, size, _PIECE):
            os.pwrite(file, bytes(min(_PIECE, size - at)), at)
        os.fsync(file)
    finally:
        os.close(file)
    path.unlink()
    return size


def sweep(folder: Path) -> None:
    """Remove temporary files of killed processes in `folder` and below it; those of living processes are kept.

    Raises:
        OSError: a file or folder cannot be removed.
    """
    for parent, folders, names in os.walk(folder):
        for name in [*folders, *names]:
            if fnmatchcase(name, TEMPORARY):
                _remove_dead(Path(parent, name))
        # A store may have very many blobs, and blobs are not written with this module.
        folders[:] = [name for name in folders if name != "blobs" and not fnmatchcase(name, TEMPORARY)]


@contextmanager
def hidden_folder(path: Path) -> Iterator[Path]:
    """Yield a new hidden folder beside `path`, locked by this process; it is removed afterwards."""
    folder, handle = _locked_folder(path)
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        os.close(handle)


def _locked_folder(path: Path) -> tuple[Path, int]:
    while True:
        folder = Path(tempfile.mkdtemp(prefix=f".{path.name[:64]}.", suffix=".tmp", dir=path.parent))
        # The folder is locked, not the file in it: writers may replace the file.
        handle = os.open(folder, os.O_RDONLY)
        if _lock(handle) is not False and folder.exists():
            return folder, handle
        os.close(handle)  # another process swept it before it was locked


def _lock(handle: int) -> bool | None:
    """Lock an open file or folder; False if another process holds the lock, None if the file system has no locks."""
    try:
        return _try_lock(handle, fcntl.LOCK_EX)
    except OSError:
        return None


def _remove_dead(path: Path) -> None:
    if path.is_symlink():
        return  # this module writes no symbolic links
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
        return  # its writer or another sweep removed it first
    finally:
        os.close(handle)


def write_text(path: Path, text: str, *, shared: bool = False) -> None:
    """Write `text` to `path` atomically; `shared` as in `atomic_path`."""
    with atomic_path(path, shared=shared) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_json(path: Path, value: Any, *, shared: bool = False) -> None:
    """Write `value` to `path` as indented JSON, atomically. NaN is an error: JSON does not have it."""
    text = json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False, sort_keys=False)
    write_text(path, text + "\n", shared=shared)


def read_json(path: Path) -> Any:
    """Read JSON from `path`.

    Raises:
        ProperError: the file is missing or is not JSON.
    """
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise ProperError(f"{path}: no such file") from error
    except (ValueError, RecursionError) as error:  # also numbers of 5000 digits, and lists nested 5000 deep
        raise ProperError(f"{path}: not readable as JSON: {error}") from error


def hash_value(value: Any) -> str:
    """Return a stable hash of a JSON-serializable value: 16 hex digits of SHA-256."""
    text = json.dumps(value, sort_keys=True, ensure_ascii=False, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def hash_file(path: Path) -> str:
    """Return the SHA-256 of a file's bytes as hex, read in pieces of 1 MiB."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while piece := file.read(_PIECE):
            digest.update(piece)
    return digest.hexdigest()
