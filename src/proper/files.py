"""Files that are never half-written and that only their owner reads, and hashes of what is in them.

Below a run folder only files of its registry (`run_files`) are written. What is not whole yet lies in a hidden folder
beside its place, which its writer keeps locked: so `sweep` can tell what a killed process left there. Personal is the
default: 0600 for files, 0700 for folders, whatever the umask says. Knows nothing about what the files mean.
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import json
import os
import shutil
import stat
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from proper.errors import ProperError
from proper.run_files import TEMPORARY, require_listed

PRIVATE_FILE, PRIVATE_FOLDER = 0o600, 0o700
_OTHERS = 0o007


def make_folder(path: Path, *, shared: bool = False) -> None:
    """Make a folder and the folders above it that are missing, for the owner only unless `shared`.

    A folder that is there keeps its mode; `close_to_others` is for those that hold personal data.
    """
    missing = [each for each in (path, *path.parents) if not each.exists()]
    for each in reversed(missing):
        each.mkdir(0o777 if shared else PRIVATE_FOLDER, exist_ok=True)


def private_folder(path: Path) -> None:
    """Make a folder for the owner only; one that is there is closed to others (see `close_to_others`)."""
    make_folder(path)
    close_to_others(path)


def close_to_others(path: Path) -> None:
    """Take group and others out of the mode of a file or folder that others may open; a link is not followed.

    What an operator opened to a group only (0640, 0750) stays as it is; so does what belongs to another owner.
    """
    found = path.lstat()
    if stat.S_ISLNK(found.st_mode) or not found.st_mode & _OTHERS or found.st_uid != os.geteuid():
        return
    path.chmod(stat.S_IMODE(found.st_mode) & 0o7700)


def open_private(path: Path, flags: int) -> int:
    """Open a file by `os.open`, made for the owner only if `flags` make it, and closed to others if it is there.

    Raises:
        OSError: also where the path is a symbolic link, which is never followed.
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


def links_out_of(folder: Path) -> list[Path]:
    """Return the symbolic links below a folder that lead out of it; none of them is followed."""
    home, found = folder.resolve(), list[Path]()
    for parent, folders, files in os.walk(folder):
        for path in (Path(parent, name) for name in (*folders, *files)):
            if path.is_symlink() and not Path(os.path.realpath(path)).is_relative_to(home):
                found.append(path)
    return sorted(found)


@contextmanager
def locked(path: Path, *, wait: bool = True) -> Iterator[int | None]:
    """Hold a file's flock, which the kernel gives back when the process dies; yields the open file.

    Yields None if another process or thread holds it and `wait` is off.

    Raises:
        OSError: the file cannot be made or opened.
    """
    file = open_private(path, os.O_RDWR | os.O_CREAT)
    try:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        except BlockingIOError:
            yield None
            return
        yield file
    finally:
        os.close(file)


@contextmanager
def atomic_path(path: Path, *, shared: bool = False) -> Iterator[Path]:
    """Yield a temporary path beside `path`; on success it replaces `path`, on failure it is removed.

    Only the owner may read it (0600), unless `shared`: then the umask decides.

    Raises:
        InputError: `path` lies in a run folder and is none of its files.
        ProperError: the disk is full or the folder cannot be written; `path` is as it was.
    """
    require_listed(path)
    try:
        make_folder(path.parent, shared=shared)
        with _hidden_folder(path) as folder:
            temporary = folder / "new.tmp"
            os.close(os.open(temporary, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o666 if shared else PRIVATE_FILE))
            mode = stat.S_IMODE(temporary.stat().st_mode)
            yield temporary
            with temporary.open("rb+") as file:
                os.fsync(file.fileno())
            # Some writers replace the file, and with it its mode.
            temporary.chmod(mode)
            os.replace(temporary, path)
    except OSError as error:
        raise ProperError(f"{path}: cannot be written: {error.strerror or error}") from error


@contextmanager
def atomic_folder(path: Path, *, shared: bool = False) -> Iterator[Path]:
    """Yield a temporary folder beside `path`; on success it becomes `path`, on failure it is removed.

    A folder that was there is put aside first and removed last; between the two renames neither is at `path`. Only the
    owner may open it and its files (0700, 0600), unless `shared`: then the umask decides.

    Raises:
        InputError: `path` lies in a run folder.
        ProperError: the disk is full or the place cannot be written; `path` is as it was.
    """
    require_listed(path)
    try:
        make_folder(path.parent, shared=shared)
        with _hidden_folder(path) as hidden:
            new = hidden / "new"
            new.mkdir(0o777 if shared else PRIVATE_FOLDER)
            yield new
            _settle(new)
            if path.exists():
                os.replace(path, hidden / "old")
            os.replace(new, path)
    except OSError as error:
        raise ProperError(f"{path}: cannot be written: {error.strerror or error}") from error


def _settle(folder: Path) -> None:
    """Have all files of a folder on the disk, with the folder's own mode."""
    mode = stat.S_IMODE(folder.stat().st_mode)
    for entry in folder.rglob("*"):
        if entry.is_file() and not entry.is_symlink():
            with entry.open("rb+") as opened:
                os.fsync(opened.fileno())
            entry.chmod(mode & 0o666)
        elif entry.is_dir() and not entry.is_symlink():
            entry.chmod(mode)


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


def write_text(path: Path, text: str, *, shared: bool = False) -> None:
    """Write `text` to `path` atomically; `shared` as in `atomic_path`."""
    with atomic_path(path, shared=shared) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_json(path: Path, value: Any, *, shared: bool = False) -> None:
    """Write `value` to `path` as indented JSON, atomically. NaN is an error: JSON has none."""
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
