"""Cache of object storage on the local disk: one file per adapter, least recently used first out, bounded in bytes.

    cache/N.shard@OFFSET    the bytes of one adapter
    cache/size              their sum; also the lock of all that change the folder

Several processes share a cache. The sum is written before a file is, so a kill leaves it too large, never too small,
and the next eviction counts anew. A file may be torn or old: the reader compares the checksum in the manifest.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Container, Iterable, Mapping
from contextlib import suppress
from pathlib import Path

from proper.adapters.manifest import ByteRange
from proper.files import locked, open_private, private_folder, wipe_file

_KEPT = 0.9
"""An eviction leaves this share of the limit, so that not every insertion evicts."""


class ShardCache:
    """Files of adapters in a folder.

    Args:
        folder: the folder; created with the first file.
        limit: largest sum of the files' sizes, in bytes.
    """

    def __init__(self, folder: Path, limit: int) -> None:
        self.folder, self.limit = folder, limit
        self._size, self._new = folder / "size", folder / "new"

    def read(self, place: ByteRange, target: memoryview) -> bool:
        """Read an adapter into `target`, which has its length; return False if the cache does not have it."""
        path = self._path(place)
        try:
            with path.open("rb", buffering=0) as file:
                at = 0
                while at < len(target) and (count := file.readinto(target[at:])):
                    at += count
            if at == len(target):
                os.utime(path)
            return at == len(target)
        except OSError:  # not there, or not readable: the object is
            return False

    def add(self, place: ByteRange, data: bytes, is_current: Callable[[], bool]) -> None:
        """Keep the bytes of an adapter, if they fit and `is_current()`.

        `is_current` is asked under the lock that `remove` takes. A deletion commits before it removes, so bytes that
        were read before the commit are either removed or never written.
        """
        if len(data) > self.limit or (not self.folder.exists() and not os.access(self.folder.parent, os.W_OK)):
            return
        with suppress(OSError):  # a full disk: without the cache the object is read again
            private_folder(self.folder)
            with locked(self._size) as handle:
                assert handle is not None
                path = self._path(place)
                if not is_current():
                    return
                total = self._total(handle) + len(data)
                if total > self.limit:
                    total = self._evict(int(self.limit * _KEPT) - len(data)) + len(data)
                self._note(handle, total)
                with os.fdopen(open_private(self._new, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), "wb") as file:
                    file.write(data)
                os.replace(self._new, path)

    def remove(self, places: Iterable[ByteRange]) -> None:
        """Zero and remove the files of these adapters, and a file that a killed process was writing."""
        if not self._size.exists():
            return
        with locked(self._size) as handle:
            assert handle is not None
            wipe_file(self._new)
            self._note(handle, self._total(handle) - sum(wipe_file(self._path(place)) for place in places))

    def move(self, moved: Mapping[ByteRange, ByteRange]) -> None:
        """Rename the files of adapters whose bytes were copied to another place."""
        if not self._size.exists():
            return
        with locked(self._size):
            for old, new in moved.items():
                with suppress(FileNotFoundError):
                    os.replace(self._path(old), self._path(new))

    def retain(self, blobs: Callable[[], Container[str]]) -> int:
        """Wipe all files but those of the blobs `blobs()`; return how many bytes were wiped."""
        if not self._size.exists():
            return 0
        with locked(self._size) as handle:
            assert handle is not None
            wipe_file(self._new)
            kept = blobs()  # under the lock: what is added later is of blobs that are added later
            paths = [path for path in self.folder.iterdir() if path != self._size]
            gone = sum(wipe_file(path) for path in paths if path.name.partition("@")[0] not in kept)
            self._note(handle, self._count())
            return gone

    def _path(self, place: ByteRange) -> Path:
        return self.folder / f"{place.blob}@{place.offset}"

    def _total(self, handle: int) -> int:
        return int.from_bytes(os.pread(handle, 8, 0), "little")

    def _note(self, handle: int, total: int) -> None:
        os.pwrite(handle, max(0, total).to_bytes(8, "little"), 0)

    def _count(self) -> int:
        return sum(entry.stat().st_size for entry in os.scandir(self.folder) if entry.name != self._size.name)

    def _evict(self, most: int) -> int:
        """Remove the files that were not used for longest until `most` bytes are left; return how many are."""
        files = [(entry.stat().st_mtime_ns, entry.stat().st_size, entry.path) for entry in os.scandir(self.folder)]
        files = sorted(each for each in files if each[2] != str(self._size))
        total = sum(size for _, size, _ in files)
        for _, size, path in files:
            if total <= most:
                break
            os.unlink(path)
            total -= size
        return total
