"""Files below a folder, and the content of any file as streams of bytes: raw and, if compressed or paged, decoded.

raw         every byte, for SQLite files the free pages too
SQLite      every cell with text or bytes, since long values are divided into pages
gzip, zstd, bzip2, xz, zip, Parquet     the decompressed content, nested files included
"""

from __future__ import annotations

import bz2
import gzip
import io
import lzma
import os
import sqlite3
import stat
import zipfile
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path
from typing import BinaryIO, NamedTuple
from zlib import error as ZlibError

from proper.errors import StoreError
from proper.sqlite_files import open_to_read

CHUNK = 1 << 22
_ROWS = 1000  # rows of a table in memory at once
_DEPTH = 4
_SQLITE, _PARQUET, _ZSTD = b"SQLite format 3\0", b"PAR1", b"\x28\xb5\x2f\xfd"
UNREADABLE = (
    *(OSError, EOFError, sqlite3.Error, zipfile.BadZipFile, lzma.LZMAError, ZlibError, ValueError, RuntimeError),
    StoreError,
)
"""Exceptions that reading a damaged file may raise."""


class Content(NamedTuple):
    """One stream of a file: how it was read, the name inside of an archive, and its pieces in order."""

    how: str
    inside: str
    pieces: Iterator[bytes]


def files_below(folder: Path, unread: Callable[[Path, OSError], None] = lambda path, error: None) -> list[Path]:
    """Return the files that are searched, in order: all below a folder; `unread` gets folders that cannot be read."""
    return sorted(path for path in everything_below(folder, unread) if _is_file(path))


def everything_below(
    folder: Path, unread: Callable[[Path, OSError], None] = lambda path, error: None
) -> Iterator[Path]:
    """Yield all that is below a folder. `Path.rglob` ends where a folder is removed, and skips what it may not read."""
    for parent, folders, names in os.walk(folder, onerror=lambda error: unread(Path(error.filename), error)):
        yield from (Path(parent, name) for name in (*folders, *names))


def _is_file(path: Path) -> bool:
    try:
        return stat.S_ISREG(path.lstat().st_mode)
    except OSError:
        return True  # reading it says why


def is_gone(path: Path) -> bool:
    """Return whether there is no such file any more."""
    try:
        path.lstat()
    except OSError as error:
        return isinstance(error, FileNotFoundError)
    return False


def contents(path: Path) -> Iterator[Content]:
    """Yield the streams of a file; an error of `UNREADABLE` may come from here or from a stream."""
    with path.open("rb") as file:
        head = file.read(16)
    yield Content("raw", "", _raw(path))
    if head.startswith(_SQLITE):
        yield Content("SQLite", "", _cells(path))
    else:
        with path.open("rb") as file:
            yield from _decoded(file, head, "", _DEPTH)


def _raw(path: Path) -> Iterator[bytes]:
    with path.open("rb") as file:
        yield from _pieces(file)


def _pieces(file: BinaryIO) -> Iterator[bytes]:
    with closing(file):
        while piece := file.read(CHUNK):
            yield piece


def _decoded(file: BinaryIO, head: bytes, inside: str, depth: int) -> Iterator[Content]:
    """Yield the content of a compressed file, and that of compressed files in it."""
    opened = _opened(file, head)
    if opened is not None:
        how, unpacked = opened
        yield Content(how, inside, _pieces(unpacked))
        file.seek(0)
        again = _opened(file, head)
        assert again is not None
        yield from _within(again[1], inside, depth)
    elif head.startswith(_PARQUET):
        yield Content("Parquet", inside, _rows(file))
    elif head.startswith((b"PK\x03\x04", b"PK\x05\x06")):
        with zipfile.ZipFile(file) as archive:
            for name in archive.namelist():
                where = f"{inside}/{name}".lstrip("/")
                yield Content("zip", where, iter([name.encode("utf-8", "surrogateescape")]))
                yield Content("zip", where, _pieces(archive.open(name)))  # type: ignore[arg-type]
                with archive.open(name) as member:
                    yield from _within(member, where, depth)  # type: ignore[arg-type]


def _within(file: BinaryIO, inside: str, depth: int) -> Iterator[Content]:
    head = file.read(16)
    packed = _opened(io.BytesIO(b""), head) is not None or head.startswith((_PARQUET, b"PK\x03\x04"))
    if depth and packed:
        yield from _decoded(io.BytesIO(head + file.read()), head, inside, depth - 1)


def _opened(file: BinaryIO, head: bytes) -> tuple[str, BinaryIO] | None:
    """Return the name of a compression and the file unpacked; None if the head is of none."""
    if head.startswith(b"\x1f\x8b"):
        return "gzip", gzip.open(file)  # type: ignore[return-value]
    if head.startswith(b"BZh"):
        return "bzip2", bz2.open(file)  # type: ignore[return-value]
    if head.startswith(b"\xfd7zXZ"):
        return "xz", lzma.open(file)  # type: ignore[return-value]
    if head.startswith(_ZSTD):
        import pyarrow

        return "zstd", pyarrow.CompressedInputStream(pyarrow.BufferReader(file.read()), "zstd")
    return None


def _rows(file: BinaryIO) -> Iterator[bytes]:
    from pyarrow import parquet

    file.seek(0)
    for batch in parquet.ParquetFile(file).iter_batches():
        yield "\0".join(repr(value) for row in batch.to_pylist() for value in ("", *row.values(), "")).encode()


def _cells(path: Path) -> Iterator[bytes]:
    """Yield all cells of an SQLite file that are text or bytes, the write-ahead log included, divided by zeros."""
    with closing(open_to_read(path)) as data:
        data.text_factory = bytes
        tables = data.execute("SELECT name FROM sqlite_master WHERE type = 'table'").fetchall()
        for (table,) in tables:
            name = table.decode().replace('"', '""')
            rows = data.execute(f'SELECT * FROM "{name}"')
            while some := rows.fetchmany(_ROWS):
                cells = [cell for row in some for cell in (b"", *row, b"") if isinstance(cell, bytes)]
                yield b"\0".join(cells)
