"""Opens whatever a config's `data.path` is, as rows of plain values that stream.

One source is one file, or one Hugging Face dataset. Knows nothing about which columns mean what.
"""

from __future__ import annotations

import gzip
import json
import re
import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, BinaryIO

from proper.config import DataConfig
from proper.data.templates import nearest
from proper.errors import DataError

Row = dict[str, Any]

_ENDINGS = {
    "jsonl": (".jsonl", ".jsonl.gz", ".ndjson", ".ndjson.gz", ".json", ".json.gz"),
    "parquet": (".parquet", ".pq"),
}
_BATCH = 1024
_HEAD = 1000
"""Rows of a JSONL file that are read to learn which columns there are."""


@dataclass(frozen=True)
class Source:
    """Rows under one name.

    `columns` is None where nothing tells them (no line of a JSONL file is an object). `read(columns)` yields
    (row number from 1, values by column), or what is wrong with the row instead of its values.
    """

    name: str
    columns: tuple[str, ...] | None
    read: Callable[[Sequence[str]], Iterator[tuple[int, Row | str]]]


def open_sources(config: DataConfig) -> list[Source]:
    """Find and open the files behind `config.path`, in name order.

    Raises:
        DataError: nothing is there, its format is not known, or it cannot be read.
    """
    if config.given_split:
        return _benchmark(config)
    path = Path(config.path).expanduser()
    kind = _kind(config, path) if config.format == "auto" else config.format
    if kind == "huggingface":
        return [_huggingface(config, path)]
    if not path.exists():
        raise DataError(f"{config.path}: no such file or folder (data.path)")
    files = _files(path, kind) if path.is_dir() else [path]
    if not files:
        raise DataError(f"{config.path}: no {kind} file in this folder; the names end in {', '.join(_ENDINGS[kind])}")
    return [_jsonl(file) if kind == "jsonl" else _parquet(file) for file in files]


def _benchmark(config: DataConfig) -> list[Source]:
    from proper.data.lamp import lamp_sources  # noqa: PLC0415 - they build on this module
    from proper.data.oppu import oppu_sources

    return lamp_sources(config) if config.format == "lamp" else oppu_sources(config)


def _kind(config: DataConfig, path: Path) -> str:
    if path.is_dir():
        if any((path / name).is_file() for name in ("state.json", "dataset_dict.json")):
            return "huggingface"
        kinds = [kind for kind in _ENDINGS if _files(path, kind)]
        if len(kinds) == 1:
            return kinds[0]
        found = "files of several formats" if kinds else "no .jsonl or .parquet file"
        raise DataError(f"{config.path}: {found} in this folder; data.format says which format to read")
    for kind, endings in _ENDINGS.items():
        if path.name.lower().endswith(endings):
            return kind
    if path.exists():
        raise DataError(f"{config.path}: format not known by its name; set data.format to jsonl or parquet")
    if re.fullmatch(r"[\w.-]+/[\w.-]+", config.path) and not path.parent.is_dir():
        return "huggingface"
    raise DataError(f"{config.path}: no such file or folder (data.path)")


def _files(folder: Path, kind: str) -> list[Path]:
    files = (file for file in folder.iterdir() if file.is_file() and not file.name.startswith((".", "_")))
    endings = _ENDINGS[kind]
    # A folder's other .json files are rather metadata than rows.
    return sorted(file for file in files if file.name.lower().endswith(endings[:4] if kind == "jsonl" else endings))


def _jsonl(file: Path) -> Source:
    columns: dict[str, None] = {}
    for _, row in islice(json_rows(file), _HEAD):
        if isinstance(row, dict):
            columns.update(dict.fromkeys(row))
    return Source(str(file), tuple(columns) or None, lambda wanted: json_rows(file))


def json_rows(file: Path) -> Iterator[tuple[int, Row | str]]:
    """Yield the lines of a JSONL file that are not empty, with their numbers; what is wrong with one as a text.

    Raises:
        DataError: the file cannot be read.
    """
    try:
        with _open(file) as lines:
            for number, line in enumerate(lines, 1):
                if line.strip():
                    yield number, _json_object(line)
    except (OSError, EOFError, zlib.error) as error:
        raise DataError(f"{file}: cannot be read: {getattr(error, 'strerror', None) or error}") from error


def _open(file: Path) -> BinaryIO | gzip.GzipFile:
    return gzip.open(file, "rb") if file.name.lower().endswith(".gz") else file.open("rb")


def _json_object(line: bytes) -> Row | str:
    try:
        value = json.loads(line.decode("utf-8-sig").rstrip())
    except UnicodeDecodeError:
        return "not UTF-8"
    except json.JSONDecodeError as error:
        return f"not JSON ({error.msg} at column {error.colno})"
    except (ValueError, RecursionError):
        return "not JSON that can be read (a number too long, or nested too deep)"
    return value if isinstance(value, dict) else f"a JSON {_json_name(value)}, where an object is wanted"


def _json_name(value: object) -> str:
    names = {list: "array", str: "string", bool: "boolean", type(None): "null"}
    return names.get(type(value), "number")


def _parquet(file: Path) -> Source:
    import pyarrow as arrow  # noqa: PLC0415 - half a second that JSONL need not pay
    import pyarrow.parquet as parquet

    try:
        columns = tuple(parquet.read_schema(file).names)
    except (OSError, arrow.ArrowException) as error:
        raise DataError(f"{file}: not readable as Parquet: {_first_line(error)}") from error

    def read(wanted: Sequence[str]) -> Iterator[tuple[int, Row | str]]:
        number = 0
        try:
            with parquet.ParquetFile(file, buffer_size=1 << 20) as opened:
                for batch in opened.iter_batches(_BATCH, columns=list(wanted), use_threads=False):
                    for row in _table_rows(batch):
                        number += 1
                        yield number, row
        except (OSError, arrow.ArrowException) as error:
            raise DataError(f"{file}: cannot be read after row {number}: {_first_line(error)}") from error

    return Source(str(file), columns, read)


def _table_rows(batch: Any) -> Iterator[Row]:
    """Turn an Arrow batch or table into rows of plain values."""
    names = batch.schema.names
    columns = [_plain_column(column) for column in batch.columns]
    for values in zip(*columns, strict=True):
        yield dict(zip(names, values, strict=True))


def _plain_column(column: Any) -> list[Any]:
    import pyarrow as arrow

    kind = column.type
    if arrow.types.is_dictionary(kind):
        return column.to_pylist()  # type: ignore[no-any-return]
    if arrow.types.is_float32(kind) or arrow.types.is_float16(kind):
        # The shortest digits that mean the same: 3.3 as float32 is no 3.299999952316284.
        return [None if value is None else float(str(value)) for value in _scalars(column)]
    if arrow.types.is_timestamp(kind):
        # Python's datetime stops at microseconds.
        column = column.cast(arrow.timestamp("us", kind.tz), safe=False)
    return column.to_pylist()  # type: ignore[no-any-return]


def _scalars(column: Any) -> Iterator[Any]:
    values, missing = column.to_numpy(zero_copy_only=False), column.is_null().to_pylist()
    return (None if gone else value for value, gone in zip(values, missing, strict=True))


def _huggingface(config: DataConfig, path: Path) -> Source:
    import datasets

    try:
        if path.is_dir() and any((path / name).is_file() for name in ("state.json", "dataset_dict.json")):
            dataset = datasets.load_from_disk(str(path))
        else:
            name = str(path) if path.is_dir() else config.path
            dataset = datasets.load_dataset(name, config.name, split=config.part, streaming=True)
        if isinstance(dataset, dict):
            if config.part not in dataset:
                raise DataError(
                    f"{config.path}: no part '{config.part}' (data.part); {nearest(config.part, [*dataset])}"
                )
            dataset = dataset[config.part]
        columns = dataset.column_names or list(next(iter(dataset), {}))
    except DataError:
        raise
    # The hub's client raises dozens of kinds, from itself and from what it stands on.
    except Exception as error:
        missing = "" if path.exists() else "no such file or folder, and "
        message = f"{config.path}: {missing}not readable as a Hugging Face dataset: {_first_line(error)}"
        raise DataError(message) from error
    return Source(config.path, tuple(columns) or None, lambda wanted: _dataset_rows(dataset, wanted, config.path))


def _dataset_rows(dataset: Any, wanted: Sequence[str], name: str) -> Iterator[tuple[int, Row | str]]:
    names = {column: feature.int2str for column, feature in _class_labels(dataset) if column in wanted}
    number = 0
    try:
        arrow = dataset.select_columns(list(wanted)).with_format("arrow")
        for batch in arrow.iter(batch_size=_BATCH):
            for row in _table_rows(batch):
                number += 1
                for column, to_name in names.items():
                    row[column] = None if row[column] in (None, -1) else to_name(row[column])
                yield number, row
    # As above: what reading raises depends on where the dataset lies.
    except Exception as error:
        raise DataError(f"{name}: cannot be read after row {number}: {_first_line(error)}") from error


def _class_labels(dataset: Any) -> list[tuple[str, Any]]:
    """Columns whose numbers stand for named classes, with the feature that knows the names."""
    features = dataset.features or {}
    return [(column, feature) for column, feature in features.items() if hasattr(feature, "int2str")]


def _first_line(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]
