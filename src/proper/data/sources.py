"""Data sources of a config's `data.path`: JSONL, CSV, Parquet, Hugging Face datasets and LaMP files, as streamed rows.

One source is one file or one Hugging Face dataset.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any

from proper.config import DataConfig
from proper.data.arrow_rows import table_rows
from proper.data.source import Row, Source
from proper.data.templates import nearest
from proper.data.text_files import PACKED, csv_source, jsonl_source
from proper.errors import DataError
from proper.extras import needs_extra

_ENDINGS = {
    "jsonl": tuple(f".{name}{packed}" for name in ("jsonl", "ndjson", "json") for packed in PACKED),
    "csv": tuple(f".{name}{packed}" for name in ("csv", "tsv") for packed in PACKED),
    "parquet": (".parquet", ".pq"),
}
_ARCHIVES = (*PACKED[1:], ".zip", ".7z", ".rar", ".tar", ".tgz", ".lz4", ".lzo", ".br", ".z", ".zstd")
_BATCH = 1024


def open_sources(config: DataConfig) -> list[Source]:
    """Find and open the files behind `config.path`, in name order.

    Raises:
        DataError: the path does not exist, its format is not known, or it cannot be read.
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
    return [_OPEN[kind](file) for file in files]


def _benchmark(config: DataConfig) -> list[Source]:
    with needs_extra("data", f"data.format: {config.format}"):
        from proper.data.lamp.official import lamp_sources  # they build on this module
        from proper.data.lamp.oppu import oppu_sources

    return lamp_sources(config) if config.format == "lamp" else oppu_sources(config)


def _kind(config: DataConfig, path: Path) -> str:
    if path.is_dir():
        if any((path / name).is_file() for name in ("state.json", "dataset_dict.json")):
            return "huggingface"
        kinds = [kind for kind in ("jsonl", "parquet") if _files(path, kind)]
        # Beside JSONL or Parquet files, a CSV file is probably supplementary and does not hold the rows.
        kinds = kinds or [kind for kind in ("csv",) if _files(path, kind)]
        if len(kinds) == 1:
            return kinds[0]
        found = "files of several formats" if kinds else "no .jsonl, .csv or .parquet file"
        raise DataError(f"{config.path}: {found} in this folder; data.format says which format to read")
    for kind, endings in _ENDINGS.items():
        if path.name.lower().endswith(endings):
            return kind
    if path.exists():
        raise DataError(f"{config.path}: {_advice(path)}")
    if re.fullmatch(r"[\w.-]+/[\w.-]+", config.path) and not path.parent.is_dir():
        return "huggingface"
    raise DataError(f"{config.path}: no such file or folder (data.path)")


def _advice(path: Path) -> str:
    """Return advice for a file whose name matches no supported format."""
    ending = path.suffix.lower()
    if ending not in _ARCHIVES:
        return "format not known by its name; set data.format to jsonl, csv or parquet"
    if ending in PACKED and not path.name.lower().removesuffix(ending).endswith(_ENDINGS["parquet"]):
        return "format not known by its name; set data.format to jsonl or csv"
    return f"a {ending} file is not read; unpack it first"


def _files(folder: Path, kind: str) -> list[Path]:
    files = (file for file in folder.iterdir() if file.is_file() and not file.name.startswith((".", "_")))
    # Other .json files in a folder are probably metadata, not rows.
    endings = tuple(each for each in _ENDINGS[kind] if not each.startswith(".json") or each.startswith(".jsonl"))
    return sorted(file for file in files if file.name.lower().endswith(endings))


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
                    for row in table_rows(batch):
                        number += 1
                        yield number, row
        except (OSError, arrow.ArrowException) as error:
            raise DataError(f"{file}: cannot be read after row {number}: {_first_line(error)}") from error

    return Source(str(file), columns, read)


_OPEN: Mapping[str, Callable[[Path], Source]] = MappingProxyType(
    {"jsonl": jsonl_source, "csv": csv_source, "parquet": _parquet}
)


def _huggingface(config: DataConfig, path: Path) -> Source:
    missing = "" if path.exists() else "no such file or folder, and "
    with needs_extra("data", f"{config.path}: {missing}reading a Hugging Face dataset"):
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
    # The hub's client raises dozens of exception types, its own and those of its dependencies.
    except Exception as error:
        message = f"{config.path}: {missing}not readable as a Hugging Face dataset: {_first_line(error)}"
        raise DataError(message) from error
    return Source(config.path, tuple(columns) or None, lambda wanted: _dataset_rows(dataset, wanted, config.path))


def _dataset_rows(dataset: Any, wanted: Sequence[str], name: str) -> Iterator[tuple[int, Row | str]]:
    names = {column: feature.int2str for column, feature in _class_labels(dataset) if column in wanted}
    number = 0
    try:
        arrow = dataset.select_columns(list(wanted)).with_format("arrow")
        for batch in arrow.iter(batch_size=_BATCH):
            for row in table_rows(batch):
                number += 1
                for column, to_name in names.items():
                    row[column] = None if row[column] in (None, -1) else to_name(row[column])
                yield number, row
    # As above: the exception types depend on where the dataset is stored.
    except Exception as error:
        raise DataError(f"{name}: cannot be read after row {number}: {_first_line(error)}") from error


def _class_labels(dataset: Any) -> list[tuple[str, Any]]:
    """Return the `ClassLabel` columns, each with the feature that maps its numbers to names."""
    features = dataset.features or {}
    return [(column, feature) for column, feature in features.items() if hasattr(feature, "int2str")]


def _first_line(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]
