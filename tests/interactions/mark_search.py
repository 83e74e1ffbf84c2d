"""A search of every byte of a folder for users' marks, independent of the search of `proper users verify-deleted`."""

from __future__ import annotations

import base64
import gzip
import io
import shutil
import sqlite3
import tempfile
import zipfile
from collections import defaultdict
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from tests.interactions.walk import MARKS, name


def forms(mark: str) -> Iterator[bytes]:
    """Yield the bytes that a mark is inside a longer text: as it is, in UTF-16, hexadecimal, and base64."""
    plain = mark.encode()
    yield from (plain, mark.encode("utf-16-le"), plain.hex().encode())
    for before in range(3):
        whole = base64.b64encode(bytes(before) + plain)
        yield whole[(0, 2, 3)[before] : (before + len(plain)) * 8 // 6]


SEARCHED = {form.lower(): mark for mark in MARKS for form in forms(mark)}


def contents(path: Path) -> Iterator[bytes]:
    """Yield a file's bytes, and what they are where they are compressed or divided into pages."""
    raw = path.read_bytes()
    yield raw
    if raw.startswith(b"SQLite format 3\0"):
        with tempfile.TemporaryDirectory() as place:
            for each in (path, path.with_name(f"{path.name}-wal")):
                if each.exists():
                    shutil.copy(each, place)
            with closing(sqlite3.connect(Path(place) / path.name)) as data:
                for (table,) in data.execute("SELECT name FROM sqlite_master WHERE type = 'table'").fetchall():
                    for row in data.execute(f'SELECT * FROM "{table}"'):
                        yield b"\0".join(each if isinstance(each, bytes) else str(each).encode() for each in row)
    elif raw.startswith(b"\x1f\x8b"):
        yield gzip.decompress(raw)
    elif raw.startswith(b"\x28\xb5\x2f\xfd"):
        yield pa.input_stream(io.BytesIO(raw), compression="zstd").read()
    elif raw.startswith(b"PAR1"):
        yield repr(pq.read_table(io.BytesIO(raw)).to_pylist()).encode()
    elif zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as archive:
            yield from (archive.read(each) for each in archive.namelist())


def search(folder: Path) -> dict[Path, set[str]]:
    """Return the marks in the name and the content of every file, by path relative to the folder."""
    hits = defaultdict[Path, set[str]](set)
    for path in (path for path in folder.rglob("*") if path.is_file()):
        relative = path.relative_to(folder)
        for piece in (str(relative).encode(), *contents(path)):
            lowered = piece.lower()
            if found := {mark for form, mark in SEARCHED.items() if form in lowered}:
                hits[relative] |= found
    return dict(hits)


def tensors(run: Path, marks: list[str]) -> set[bytes]:
    """Return pieces of every embedding and adapter that the stores of a run, its seeds and variants have of users."""
    pieces = list[bytes]()
    for path in run.rglob("users.sqlite"):
        with closing(sqlite3.connect(path)) as store:
            for mark in marks:
                sql = "SELECT embedding, blob, offset, length FROM records WHERE user = ?"
                for embedding, blob, offset, length in store.execute(sql, (name(mark).encode(),)):
                    adapter = (path.parent / "blobs" / blob).read_bytes()[offset:][:length] if blob else b""
                    pieces += (each[at : at + 32] for each in (embedding, adapter) for at in range(0, len(each), 64))
    shared = (run / "groups" / "groups.safetensors").read_bytes()  # some embeddings are still the mean
    return {piece for piece in pieces if len(set(piece)) > 8 and piece not in shared}


def files(folder: Path) -> Iterator[Path]:
    return (path for path in folder.rglob("*") if path.is_file())


def any_of(pieces: set[bytes], folder: Path) -> list[Path]:
    """Return the files in which any of the pieces is."""
    return [
        path for path in files(folder) if any(piece in content for content in [path.read_bytes()] for piece in pieces)
    ]
