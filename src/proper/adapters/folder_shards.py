"""Shard storage in a local folder; see `shards` for the files."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path

from proper.adapters.manifest import ByteRange, Manifest, ManifestRow, shard_name, shard_number
from proper.adapters.shards import BlobWriter, erase, fill, lock_shard, stream, wipe_tail
from proper.adapters.storage import Aside, ShardWriter, move_live
from proper.errors import StoreError
from proper.files import locked, private_folder

_TOGETHER = 8  # shards that are rewritten at once
_PIECE = 1 << 20  # bytes that are read at once
_FILE = ".safetensors"


class FolderShards:
    """The blob files of a folder.

    Args:
        folder: the folder.
        manifest: the manifest of the blobs.
        lock: the file that writers of blobs hold shared until they have committed.

    Raises:
        StoreError: the folder is a symbolic link.
    """

    def __init__(self, folder: Path, manifest: Manifest, lock: Path) -> None:
        if folder.is_symlink():
            raise StoreError(f"{folder}: is a symbolic link; put the folder itself there, or mount one")
        self.folder, self.manifest, self._lock = folder, manifest, lock

    @property
    def name(self) -> str:
        """The folder's path."""
        return str(self.folder)

    def where(self, blob: str) -> str:
        """Return a blob's path."""
        return str(self.folder / blob)

    def make(self) -> None:
        """Make the folder."""
        private_folder(self.folder)

    def writer(self, shard_bytes: int) -> ShardWriter:
        """Return a writer of this folder."""
        return BlobWriter(self.folder, self.manifest, shard_bytes)

    def fill(self, row: ManifestRow, target: memoryview) -> None:
        """Read a row's adapter into `target`."""
        assert row.place is not None
        fill(self.folder, row.place, row.xxh3, target)

    def stream(self, row: ManifestRow, buffer: memoryview, take: Callable[[int, int], None]) -> None:
        """Read a row's adapter through `buffer`."""
        assert row.place is not None
        stream(self.folder, row.place, row.xxh3, buffer, take)

    def pieces(self, place: ByteRange) -> Iterator[bytes]:
        """Yield the bytes of a range, in pieces of at most 1 MiB."""
        left = place.length
        with (self.folder / place.blob).open("rb", buffering=0) as file:
            file.seek(place.offset)
            while left and (piece := file.read(min(left, _PIECE))):
                yield piece
                left -= len(piece)

    def erase(self, *, thorough: bool = True) -> None:
        """Erase everything that is scheduled, `thorough` or not: zeroing a range costs little."""
        erase(self.folder, self.manifest)

    def remove_unowned(self, patience: float) -> bool:
        """Wipe bytes behind the shards' committed ends, and remove files of large adapters that no row names."""
        try:
            for number in self.manifest.shards():
                wipe_tail(self.folder, self.manifest, number)
            files = self._files()
            if not files or files <= self._named():  # where all adapters are in shards, no query of every row
                return True
            with locked(self._lock, patience=patience) as alone:
                if alone is None:
                    return False  # the rows of a living writer's files are still to come
                for name in self._files() - self._named():
                    os.unlink(self.folder / name)
            return True
        except OSError as error:
            raise StoreError(f"{error.filename or self.folder}: cannot be erased: {error.strerror or error}") from error

    def _files(self) -> set[str]:
        with os.scandir(self.folder) as entries:
            return {entry.name for entry in entries if entry.name.endswith(_FILE)}

    def _named(self) -> set[str]:
        blobs = self.manifest.referenced() | {each.blob for each in self.manifest.erasures()}
        return {blob for blob in blobs if blob.endswith(_FILE)}

    def sweep(self) -> None:
        """Do nothing: a folder has no cache."""

    def compact(self, below: float, writer: ShardWriter) -> int:
        """Rewrite shards with few live bytes; those that another process appends to are skipped."""
        writer.close()  # so that its shard can be rewritten too
        sizes, alive = self.manifest.shards(), self.manifest.live_bytes()
        poor = [number for number, size in sizes.items() if size and alive.get(shard_name(number), 0) < below * size]
        return sum(self._rewrite(poor[at : at + _TOGETHER], writer) for at in range(0, len(poor), _TOGETHER))

    def _rewrite(self, numbers: list[int], writer: ShardWriter) -> int:
        files: dict[str, int] = {}

        def read(place: ByteRange) -> bytes:
            return os.pread(files[place.blob], place.length, place.offset).ljust(place.length, b"\0")

        try:
            for number in numbers:
                file = lock_shard(self.folder, number)
                if file is not None:
                    files[shard_name(number)] = file
                    # Skip a truncated shard: `check` reports it, with the users whose adapters are damaged.
                    if os.fstat(file).st_size < (self.manifest.shard_size(number) or 0):
                        os.close(files.pop(shard_name(number)))
            try:
                move_live(self.manifest, writer, list(files), read)
            except BaseException as error:
                writer.undo()
                if isinstance(error, OSError):
                    raise StoreError(f"{self.folder}: cannot be compacted: {error.strerror or error}") from error
                raise
            writer.done()
        finally:
            for file in files.values():
                os.close(file)
        return len(files)

    def blobs(self) -> Iterator[tuple[str, int]]:
        """Yield name and size of every file; symbolic links are not followed."""
        for path in sorted(self.folder.iterdir()):
            try:
                size = path.lstat().st_size
            except FileNotFoundError:
                continue  # of a version that another process has replaced since
            yield path.name, size

    def set_aside(self, blob: str, target: Path) -> None:
        """Move a file (or a symbolic link, which is not followed) to `target`."""
        os.rename(self.folder / blob, target)

    def orphan_bytes(self, number: int, size: int, keep: Aside | None) -> int:
        """Count non-zero bytes in a shard's holes, and behind its committed end unless another process appends."""
        # The size was read first: bytes appended since lie behind it, and holes are never reused.
        places, path = self.manifest.owners([shard_name(number)]), self.folder / shard_name(number)
        if not path.exists():
            return 0
        # Do not follow a symbolic link: its target is outside the store.
        file = os.open(path, (os.O_RDONLY if keep is None else os.O_RDWR) | os.O_NOFOLLOW)
        try:
            at, found = 0, 0
            for start, end in [*((p.offset, p.offset + p.length) for p in places), (size, size)]:
                found += _wipe(file, path.name, at, min(start, size), keep)
                at = max(at, end)
            if keep is not None and found:
                os.fsync(file)
        finally:
            os.close(file)
        return found if self.manifest.read_only else found + self._cut_tail(path.name, keep)

    def _cut_tail(self, blob: str, keep: Aside | None) -> int:
        file = lock_shard(self.folder, shard_number(blob))
        if file is None:
            return 0
        try:
            size = self.manifest.shard_size(shard_number(blob))
            tail = 0 if size is None else max(0, os.fstat(file).st_size - size)
            if tail and keep is not None and size is not None:
                keep(f"{blob}.{size}-{size + tail}", _read(file, size, size + tail))
                os.ftruncate(file, size)
            return tail
        finally:
            os.close(file)


def _wipe(file: int, name: str, start: int, end: int, keep: Aside | None) -> int:
    """Return how many bytes of a hole are in non-zero pieces; with `keep`, quarantine and zero these pieces."""
    found = 0
    for at in range(start, end, _PIECE):
        piece = os.pread(file, min(_PIECE, end - at), at)
        if piece.count(0) < len(piece):
            found += len(piece)
            if keep is not None:
                keep(f"{name}.{at}-{at + len(piece)}", [piece])
                os.pwrite(file, bytes(len(piece)), at)
    return found


def _read(file: int, start: int, end: int) -> Iterator[bytes]:
    for at in range(start, end, _PIECE):
        yield os.pread(file, min(_PIECE, end - at), at)
