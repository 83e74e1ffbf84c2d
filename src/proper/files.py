"""Files that are never half-written and that only their owner reads, and hashes of what is in them.

Personal is the default: 0600 for files, 0700 for folders, whatever the umask says. Knows nothing about what the files
mean.
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import json
import os
import secrets
import shutil
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from proper.errors import ProperError

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
        ProperError: the disk is full or the folder cannot be written; `path` is as it was.
    """
    temporary: Path | None = None
    try:
        make_folder(path.parent, shared=shared)
        temporary = _temporary(path)
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
    finally:
        if temporary is not None:
            temporary.unlink(missing_ok=True)


@contextmanager
def atomic_folder(path: Path, *, shared: bool = False) -> Iterator[Path]:
    """Yield a temporary folder beside `path`; on success it becomes `path`, on failure it is removed.

    A folder that was there is put aside first and removed last; between the two renames neither is at `path`. Only the
    owner may open it and its files (0700, 0600), unless `shared`: then the umask decides.

    Raises:
        ProperError: the disk is full or the place cannot be written; `path` is as it was.
    """
    places: list[Path] = []
    try:
        make_folder(path.parent, shared=shared)
        for _ in ("new", "old"):
            place = _temporary(path)
            place.mkdir(0o777 if shared else PRIVATE_FOLDER)
            places.append(place)
        new, old = places
        yield new
        mode = stat.S_IMODE(new.stat().st_mode)
        for entry in new.rglob("*"):
            if entry.is_file() and not entry.is_symlink():
                with entry.open("rb+") as opened:
                    os.fsync(opened.fileno())
                entry.chmod(mode & 0o666)
            elif entry.is_dir() and not entry.is_symlink():
                entry.chmod(mode)
        if path.exists():
            os.replace(path, old)
        os.replace(new, path)
    except OSError as error:
        raise ProperError(f"{path}: cannot be written: {error.strerror or error}") from error
    finally:
        for place in places:
            shutil.rmtree(place, ignore_errors=True)


def _temporary(path: Path) -> Path:
    """Return a name beside `path` that nothing has."""
    return path.with_name(f".{path.name[:64]}.{secrets.token_hex(8)}.tmp")


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
