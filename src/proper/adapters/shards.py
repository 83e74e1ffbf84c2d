"""Blob files with adapters' bytes: append-only shards for small adapters, one safetensors file for each large one.

A writer owns the shard it appends to (an flock, which the kernel releases when the process dies), so two writers never
write to one file. Bytes behind a shard's committed size were never committed. Bytes never move inside a shard and holes
are not reused.
"""

from __future__ import annotations

import fcntl
import os
import secrets
from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import groupby
from operator import itemgetter
from pathlib import Path

import xxhash

from proper.adapters.manifest import ByteRange, Manifest, shard_name
from proper.errors import StoreError
from proper.files import open_private

# Small enough to remain in a core's cache until the checksum reads it.
CHUNK = 1 << 18
_FLUSH = 1 << 20  # bytes of a shard that wait in memory before they are written


class BlobError(StoreError):
    """Bytes are missing, truncated or changed; the message says which."""


@dataclass(eq=False)
class _Shard:
    """A shard this process appends to; `end` includes the unwritten bytes in `pending`."""

    number: int
    file: int
    end: int
    pending: list[bytes] = field(default_factory=list)
    waiting: int = 0

    def gone(self) -> bool:
        """Return whether the file has been removed."""
        return os.fstat(self.file).st_nlink == 0

    def flush(self) -> None:
        """Write the pending bytes."""
        data, at = memoryview(b"".join(self.pending)), self.end - self.waiting
        while data:
            written = os.pwrite(self.file, data, at)
            data, at = data[written:], at + written
        self.pending, self.waiting = [], 0


class BlobWriter:
    """Appends to shards and writes files. After writing: `sync`, a commit that records `sizes`, then `done`; or `undo`.

    Args:
        folder: the folder of the blob files.
        manifest: the manifest with the committed sizes.
        shard_bytes: a shard of at least this size is full.
    """

    def __init__(self, folder: Path, manifest: Manifest, shard_bytes: int) -> None:
        self.folder, self.manifest, self.shard_bytes = folder, manifest, shard_bytes
        self._current: _Shard | None = None
        self._touched: list[_Shard] = []
        self._files: list[str] = []

    def append(self, payload: bytes) -> ByteRange:
        """Add bytes to a shard."""
        shard = self._with_room(len(payload))
        if shard not in self._touched:
            self._touched.append(shard)
        place = ByteRange(shard_name(shard.number), shard.end, len(payload))
        shard.pending.append(payload)
        shard.end += len(payload)
        shard.waiting += len(payload)
        if shard.waiting >= _FLUSH:
            shard.flush()
        return place

    def write_file(self, header: bytes, payload: bytes) -> ByteRange:
        """Write header and bytes to a new file."""
        name = f"{secrets.token_hex(16)}.safetensors"
        self._files.append(name)
        with os.fdopen(open_private(self.folder / name, os.O_WRONLY | os.O_CREAT | os.O_EXCL), "wb") as file:
            file.write(header)
            file.write(payload)
            file.flush()
            os.fsync(file.fileno())
        return ByteRange(name, len(header), len(payload))

    def sync(self) -> None:
        """Flush and fsync everything written."""
        for shard in self._touched:
            shard.flush()
            os.fsync(shard.file)
        sync_folder(self.folder)

    def sizes(self) -> list[tuple[int, int]]:
        """Return the new size and the number of each shard that grew."""
        return [(shard.end, shard.number) for shard in self._touched]

    def done(self) -> None:
        """Mark everything written as committed, and release full shards."""
        for shard in self._touched:
            if shard is not self._current:
                os.close(shard.file)
        self._touched, self._files = [], []

    def undo(self) -> None:
        """Remove everything written since the last commit, as the manifest records it, whatever the error was."""
        try:
            for name in self._files:
                if not self.manifest.refers_to(name):
                    (self.folder / name).unlink(missing_ok=True)
            for shard in self._touched:
                os.ftruncate(shard.file, self.manifest.shard_size(shard.number) or 0)
        finally:  # also if the manifest cannot be read: the next commit must not make these bytes its own
            self.close()

    def close(self) -> None:
        """Release all shards."""
        for shard in {shard.file: shard for shard in (*self._touched, self._current) if shard is not None}.values():
            os.close(shard.file)
        self._current, self._touched, self._files = None, [], []

    def _with_room(self, needed: int) -> _Shard:
        shard = self._current
        if shard is not None and ((shard.end and shard.end + needed > self.shard_bytes) or shard.gone()):
            if shard not in self._touched:
                os.close(shard.file)
            shard = None
        if shard is None:
            shard = self._current = self._claim(needed)
        return shard

    def _claim(self, needed: int) -> _Shard:
        """Lock a shard that has room and that no other writer owns, or create one."""
        for number, size in self.manifest.shards().items():
            if size + needed <= self.shard_bytes and (file := lock_shard(self.folder, number)) is not None:
                shard = self._usable(number, file, needed)
                if shard is not None:
                    return shard
                os.close(file)
        while True:
            number = self.manifest.new_shard()
            os.close(open_private(self.folder / shard_name(number), os.O_RDWR | os.O_CREAT))
            file = lock_shard(self.folder, number)
            if file is not None:
                return _Shard(number, file, 0)

    def _usable(self, number: int, file: int, needed: int) -> _Shard | None:
        # Read the size under the lock: the previous owner may have appended to the shard or removed it.
        size, there = self.manifest.shard_size(number), os.fstat(file).st_size
        if size is None or there < size or size + needed > self.shard_bytes:
            return None
        if there > size:
            os.ftruncate(file, size)  # uncommitted bytes of a killed writer
        return _Shard(number, file, size)


def fill(folder: Path, place: ByteRange, checksum: bytes | None, target: memoryview) -> None:
    """Read a range into `target`, which has its length.

    Raises:
        BlobError: the bytes are not those that were written.
    """
    _check(folder, place, checksum, lambda at: target[at : at + CHUNK], _nothing)


def stream(
    folder: Path, place: ByteRange, checksum: bytes | None, buffer: memoryview, take: Callable[[int, int], None]
) -> None:
    """Read a range through a buffer of CHUNK bytes; calls `take(at, n)` for each chunk: n bytes from offset `at`.

    Raises:
        BlobError: the bytes are not those that were written; raised after the last chunk.
    """
    _check(folder, place, checksum, lambda at: buffer[: min(CHUNK, place.length - at)], take)


def _check(
    folder: Path,
    place: ByteRange,
    checksum: bytes | None,
    piece: Callable[[int], memoryview],
    take: Callable[[int, int], None],
) -> None:
    state = xxhash.xxh3_64()
    try:
        # Opened each time: a file held open would keep the bytes of a deleted user on the disk.
        file = os.open(folder / place.blob, os.O_RDONLY)
        try:
            for at in range(0, place.length, CHUNK):
                view = piece(at)
                _read(file, view, place.offset + at)
                state.update(view)
                take(at, len(view))
        finally:
            os.close(file)
    except OSError as error:
        raise BlobError(error.strerror or str(error)) from error
    if state.digest() != checksum:
        raise BlobError("its checksum differs")


def lock_shard(folder: Path, number: int) -> int | None:
    """Open a shard and lock it for this process; None if it was removed or another process holds the lock.

    Raises:
        OSError: the shard cannot be opened, or is a symbolic link.
    """
    try:
        file = open_private(folder / shard_name(number), os.O_RDWR)
    except FileNotFoundError:
        return None
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(file)
        return None
    return file


def erase(folder: Path, manifest: Manifest) -> None:
    """Wipe the bytes scheduled for erasure: ranges of shards are zeroed, files removed.

    They were scheduled in the transaction that dropped the last reference to them, so after a kill in between the next
    call completes the erasure; it is idempotent.

    Raises:
        StoreError: a file cannot be written.
    """
    noted = manifest.erasures()
    if not noted:
        return
    try:
        for blob, rows in groupby(noted, key=itemgetter(1)):
            _erase_blob(folder / blob, [(offset, length or 0) for _, _, offset, length in rows])
        sync_folder(folder)
    except OSError as error:
        raise StoreError(f"{error.filename or folder}: cannot be erased: {error.strerror or error}") from error
    with manifest.transaction():
        manifest.erased(noted)


def _erase_blob(path: Path, ranges: list[tuple[int | None, int]]) -> None:
    if any(offset is None for offset, _ in ranges):
        path.unlink(missing_ok=True)
        return
    try:
        file = open_private(path, os.O_WRONLY)
    except FileNotFoundError:
        return  # removed by compaction
    try:
        end = os.fstat(file).st_size
        for offset, length in ranges:
            assert offset is not None
            os.pwrite(file, bytes(max(0, min(length, end - offset))), offset)
        os.fsync(file)
    finally:
        os.close(file)


def wipe_tail(folder: Path, manifest: Manifest, number: int) -> None:
    """Wipe the bytes behind a shard's committed end, which a killed writer left, unless a writer owns the shard."""
    file = lock_shard(folder, number)
    if file is None:
        return
    try:
        size, end = manifest.shard_size(number), os.fstat(file).st_size
        if size is not None and size < end:
            for at in range(size, end, _FLUSH):
                os.pwrite(file, bytes(min(_FLUSH, end - at)), at)
            os.fsync(file)
            os.ftruncate(file, size)
    finally:
        os.close(file)


def sync_folder(folder: Path) -> None:
    """Fsync a folder, so that its entries are on the disk."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _read(file: int, view: memoryview, offset: int) -> None:
    while (got := os.preadv(file, [view], offset)) < len(view):
        if got == 0:
            raise BlobError("it is cut off")
        view, offset = view[got:], offset + got


def _nothing(at: int, count: int) -> None:
    """Do nothing between chunks; used by `fill`."""
