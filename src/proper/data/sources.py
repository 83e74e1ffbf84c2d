"""Data sources of a config's `data.path`: JSONL, CSV, Parquet, Hugging Face datasets and LaMP files, as streamed rows.

One source is one file or one Hugging Face dataset.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from types import MappingProxyType

from proper.config import DataConfig
from proper.data.arrow_files import huggingface_source, is_saved_dataset, parquet_source
from proper.data.lamp.official import lamp_sources
from proper.data.lamp.oppu import oppu_sources
from proper.data.rows import Source
from proper.data.text_files import PACKED, csv_source, jsonl_source
from proper.errors import DataError

_ENDINGS = {
    "jsonl": tuple(f".{name}{packed}" for name in ("jsonl", "ndjson", "json") for packed in PACKED),
    "csv": tuple(f".{name}{packed}" for name in ("csv", "tsv") for packed in PACKED),
    "parquet": (".parquet", ".pq"),
}
FROM_GIT = "git-commits"
"""Folder of data sets that `proper data from-git` makes."""
_ARCHIVES = (*PACKED[1:], ".zip", ".7z", ".rar", ".tar", ".tgz", ".lz4", ".lzo", ".br", ".z", ".zstd")


def open_sources(config: DataConfig) -> list[Source]:
    """Find and open the files behind `config.path`, in name order.

    Raises:
        DataError: the path does not exist, its format is not known, or it cannot be read.
    """
    if config.given_split:
        _require_no_parts(config, config.format)
        return lamp_sources(config) if config.format == "lamp" else oppu_sources(config)
    path = Path(os.path.expanduser(config.path))  # not Path.expanduser, which fails without a home directory
    kind = _kind(config, path) if config.format == "auto" else config.format
    if kind == "huggingface":
        return [huggingface_source(config, path)]
    _require_no_parts(config, kind)
    if not os.path.exists(path):
        raise _missing(config)
    if not path.is_dir() and not path.is_file():
        raise DataError(f"{config.path}: not a regular file; a file is read more than once, so it cannot be a pipe")
    files = _files(path, kind) if path.is_dir() else [path]
    if not files:
        names = ", ".join(_folder_endings(kind))
        raise DataError(f"{config.path}: no {kind} file in this folder; the names end in {names}")
    return [_OPEN[kind](file) for file in files]


def _require_no_parts(config: DataConfig, kind: str) -> None:
    """Raise DataError if the config names a part of a Hugging Face data set: all files of another format are read."""
    for key, value, usual in (
        ("part", config.part, DataConfig.model_fields["part"].default),
        ("name", config.name, None),
    ):
        if value != usual:
            raise DataError(f"data.{key}: {value!r} is a part of a Hugging Face data set, and {config.path} is {kind}")


def _kind(config: DataConfig, path: Path) -> str:
    if is_saved_dataset(path):
        return "huggingface"
    if path.is_dir():
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
    if os.path.exists(path):
        raise DataError(f"{config.path}: {_advice(path)}")
    if re.fullmatch(r"[\w.-]+/[\w.-]+", config.path) and not path.parent.is_dir():
        return "huggingface"
    raise _missing(config)


def _missing(config: DataConfig) -> DataError:
    """Return the error for a path that does not exist; it says how to get the file of a public data set."""
    from proper.data.public.catalog import DATASETS  # not at the top: its converters import pyarrow

    name = Path(config.path).parent.name
    how = f"; get it with: proper data fetch {name}" if name in DATASETS else ""
    if name == FROM_GIT:
        how = f"; make it with: proper data from-git REPO --out {config.path}"
    return DataError(f"{config.path}: no such file or folder (data.path){how}")


def _advice(path: Path) -> str:
    """Return advice for a file whose name matches no supported format."""
    ending = path.suffix.lower()
    if ending not in _ARCHIVES:
        if path.is_file() and _is_binary(path):  # a pipe would not end
            return "not a text file and no Parquet; convert it to JSONL, CSV or Parquet"
        return "format not known by its name; set data.format to jsonl, csv or parquet"
    if ending in PACKED and not path.name.lower().removesuffix(ending).endswith(_ENDINGS["parquet"]):
        return "format not known by its name; set data.format to jsonl or csv"
    return f"a {ending} file is not read; unpack it first"


def _is_binary(path: Path) -> bool:
    """Return whether a file is neither text nor Parquet, as spreadsheets, SQLite and Arrow files are."""
    try:
        with path.open("rb") as file:
            start = file.read(4096)
    except OSError:
        return False  # opening it in a named format gives the reason
    return b"\0" in start and not start.startswith(b"PAR1")


def _files(folder: Path, kind: str) -> list[Path]:
    # A link whose file is gone is kept, so that opening it says so.
    found = (file for file in folder.iterdir() if file.is_file() or (file.is_symlink() and not os.path.exists(file)))
    files = (file for file in found if not file.name.startswith((".", "_")))
    return sorted(file for file in files if file.name.lower().endswith(_folder_endings(kind)))


def _folder_endings(kind: str) -> tuple[str, ...]:
    """Return how the names of a format's files in a folder end; .json files there are probably metadata, not rows."""
    return tuple(each for each in _ENDINGS[kind] if not each.startswith(".json") or each.startswith(".jsonl"))


_OPEN: Mapping[str, Callable[[Path], Source]] = MappingProxyType(
    {"jsonl": jsonl_source, "csv": csv_source, "parquet": parquet_source}
)
