"""Streaming readers of text files: JSONL and CSV, compressed or not, with line numbers, and JSON arrays.

A bad line of JSONL or CSV yields an error text in place of its row, so that one bad line never ends the file. Memory
grows with the largest row, not with the file.
"""

from __future__ import annotations

import bz2
import csv
import gzip
import io
import json
import lzma
import re
import zlib
from codecs import BOM_UTF8, BOM_UTF16_BE, BOM_UTF16_LE
from collections import Counter, deque
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from itertools import chain, islice
from pathlib import Path
from typing import IO, Any, cast

from proper.data.rows import Row, Source
from proper.errors import DataError, first_line
from proper.extras import needs_extra

PACKED = ("", ".gz", ".bz2", ".xz", ".zst")
"""Suffixes of supported compression formats; the empty one stands for no compression."""

_HEAD = 1000
"""Rows of a JSONL file that are read to find its columns."""

_FIELD = 1 << 24
"""Maximum characters of a CSV cell: an unclosed quote must not read the rest of the file into memory."""

_SEPARATOR = re.compile(r"sep=(.)\s*", re.IGNORECASE)
"""The line that Excel reads, and that some programs write for it, before the names of the columns."""

_ARRAY = re.compile(rb"\s*\[\s*(\{|$)")
"""How a file begins that is one JSON array of rows."""


def jsonl_source(file: Path) -> Source:
    """Open a JSONL file; its columns are the keys of its first rows.

    Raises:
        DataError: the file cannot be read, or is one JSON array.
    """
    with _opened(file) as lines:
        first = next((line for line in lines if line.strip()), b"")
    if _ARRAY.match(first.removeprefix(BOM_UTF8)):
        raise DataError(f"{file}: one JSON array, expected one JSON object per line (jq -c .[] FILE)")
    columns = tuple(_keys(islice(json_rows(file), _HEAD)))
    return Source(
        str(file), columns or None, lambda wanted: json_rows(file), every_column=lambda: _keys(json_rows(file))
    )


def _keys(rows: Iterable[tuple[int, Row | str]]) -> dict[str, None]:
    """Return the keys of rows, in the order of their first occurrence."""
    return {key: None for _, row in rows if isinstance(row, dict) for key in row}


def csv_source(file: Path) -> Source:
    """Open a CSV or TSV file, whose first row names the columns.

    Raises:
        DataError: the file cannot be read, or the first row is malformed.
    """
    number, first = next(_csv_rows(file), (1, None))
    if isinstance(first, str):
        raise DataError(f"{file}:{number}: row: {first}")
    columns = None if first is None else tuple(first)
    return Source(str(file), columns, lambda wanted: _named(file, wanted), typed=False)


def json_rows(file: Path) -> Iterator[tuple[int, Row | str]]:
    """Yield (line number, row) for the non-empty lines of a JSONL file; a bad line yields an error text as its row.

    Raises:
        DataError: the file cannot be read.
    """
    with _opened(file) as lines:
        for number, line in enumerate(lines, 1):
            if line.strip():
                yield number, _json_object(line)


@contextmanager
def _opened(file: Path) -> Iterator[IO[bytes]]:
    """Open a file for reading, decompressed; read errors become DataErrors, as UTF-16 does."""
    try:
        with _unpacked(file) as lines:
            first = lines.peek(2)[:2]
            if first in (BOM_UTF16_LE, BOM_UTF16_BE) or b"\0" in first:
                raise DataError(f"{file}: UTF-16, expected UTF-8 (iconv -f UTF-16 -t UTF-8 FILE)")
            yield cast(IO[bytes], lines)
    except (OSError, EOFError, zlib.error, lzma.LZMAError) as error:
        raise DataError(f"{file}: cannot be read: {getattr(error, 'strerror', None) or error}") from error


def _unpacked(file: Path) -> io.BufferedReader | gzip.GzipFile | bz2.BZ2File | lzma.LZMAFile:
    ending = file.suffix.lower()
    if ending == ".gz":
        return gzip.open(file, "rb")
    if ending == ".bz2":
        return bz2.open(file, "rb")
    if ending == ".xz":
        return lzma.open(file, "rb")
    if ending == ".zst":
        import pyarrow as arrow  # not at the top: takes half a second to import

        return io.BufferedReader(arrow.input_stream(str(file), compression="zstd"))
    return file.open("rb")


def _json_object(line: bytes) -> Row | str:
    try:
        value = _JSON.decode(line.decode("utf-8-sig").rstrip())
    except UnicodeDecodeError:
        return "not UTF-8"
    except json.JSONDecodeError as error:
        return f"not JSON ({error.msg} at column {error.colno})"
    except _TwiceError as error:
        return str(error)
    except (ValueError, RecursionError):
        return "not JSON that can be read (a number too long, or nested too deep)"
    return value if isinstance(value, dict) else f"a JSON {_json_name(value)}, expected an object"


class _TwiceError(Exception):
    """A JSON object has a duplicate key, so its value is ambiguous."""


def _once(pairs: list[tuple[str, Any]]) -> Row:
    made = dict(pairs)
    if len(made) < len(pairs):
        twice, _ = Counter(key for key, _ in pairs).most_common(1)[0]
        raise _TwiceError(f"the key {ascii(twice[:40])} occurs twice")
    return made


_JSON = json.JSONDecoder(object_pairs_hook=_once)


def _json_name(value: object) -> str:
    names = {list: "array", str: "string", bool: "boolean", type(None): "null"}
    return names.get(type(value), "number")


def _named(file: Path, wanted: Sequence[str]) -> Iterator[tuple[int, Row | str]]:
    """Yield the wanted cells of a CSV file by column; an empty cell is null, as in pandas."""
    rows = _csv_rows(file)
    header = next(rows, (1, ""))[1]
    if isinstance(header, str):
        return  # an empty file; `csv_source` refuses a malformed first row
    indices = {column: header.index(column) for column in wanted}
    for number, cells in rows:
        if isinstance(cells, str):
            yield number, cells
        elif cells == header or [cells[0].lstrip("\ufeff"), *cells[1:]] == header:
            yield number, "the columns' names again, as in files that were joined"
        elif len(cells) != len(header):
            yield number, f"{len(cells)} cells, where the first row has {len(header)}"
        else:
            yield number, {column: cells[index] or None for column, index in indices.items()}


class _Lines:
    """Lines of a text file for a CSV reader, with the number of those read; a bad row gives all but its first back."""

    def __init__(self, lines: Iterable[str], number: int) -> None:
        self._lines, self._again, self._row = iter(lines), deque[str](), list[str]()
        self.number = number

    def __iter__(self) -> Iterator[str]:
        return self

    def __next__(self) -> str:
        line = self._again.popleft() if self._again else next(self._lines)
        self._row.append(line)
        self.number += 1
        return line

    def begin(self) -> int:
        """Begin a row; return the number of its first line."""
        self._row.clear()
        return self.number + 1

    def give_back(self) -> bool:
        """Give the lines of a row back, except for the first; return whether there were any."""
        rest = self._row[1:]
        self._again.extendleft(reversed(rest))
        self.number -= len(rest)
        return bool(rest)


def _csv_rows(file: Path) -> Iterator[tuple[int, list[str] | str]]:
    """Yield (number of its first line, cells or error text) for each row that is not empty.

    A quote that is not closed costs its own line, not the rows after it.
    """
    with _opened(file) as raw, io.TextIOWrapper(raw, "utf-8-sig", "surrogateescape", newline="") as text:
        # The limit is global to the process; only this function reads CSV here.
        csv.field_size_limit(_FIELD)
        first = text.readline()
        said = _SEPARATOR.fullmatch(first)
        lines = _Lines(text if said else chain([first], text) if first else [], number=1 if said else 0)
        rows = csv.reader(lines, delimiter=said[1] if said else _delimiter(file, first), strict=True)
        while True:
            begun = lines.begin()
            try:
                cells = next(rows)
            except StopIteration:
                return
            except csv.Error as error:
                why = "a quote is not closed, or more follows behind one that is" if lines.give_back() else error
                yield begun, f"not CSV ({why})"
                continue
            if cells:
                yield begun, cells if _is_text(cells) else "not UTF-8"


def _delimiter(file: Path, first: str) -> str:
    """Return what separates the cells: spreadsheets write semicolons where a decimal comma is usual, databases bars."""
    if ".tsv" in (ending.lower() for ending in file.suffixes[-2:]):
        return "\t"
    unquoted = re.sub('"[^"]*"', "", first)
    return next((mark for mark in ",;\t|" if mark in unquoted), ",")


def _is_text(cells: Sequence[str]) -> bool:
    """Return whether all cells were valid UTF-8, that is, contain no surrogate escapes."""
    try:
        "".join(cells).encode()
    except UnicodeEncodeError:
        return False
    return True


def json_entries(path: Path, where: str = "item") -> Iterator[tuple[int, Any]]:
    """Yield (number from 1, entry) of the array at ijson path `where`; "item" means that the file is one array.

    Raises:
        DataError: the file cannot be read or is not JSON; the message names the last good entry.
        MissingExtraError: the extra `data` is not installed.
    """
    with needs_extra("data", f"{path}: reading a benchmark's JSON file"):
        import ijson
    number = 0
    try:
        with path.open("rb") as file:
            for entry in ijson.items(file, where, use_float=True):
                number += 1
                yield number, entry
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error.strerror or error}") from error
    except (ijson.JSONError, UnicodeDecodeError) as error:
        after = f" after entry {number}" if number else ""
        raise DataError(f"{path}: not readable as JSON{after}: {first_line(error)}") from error


def json_value(path: Path, key: str) -> Any:
    """Return the value of one key of a file that is a JSON object; None if the key is missing.

    Raises:
        DataError: as in `json_entries`.
    """
    return next((value for _, value in json_entries(path, key)), None)
