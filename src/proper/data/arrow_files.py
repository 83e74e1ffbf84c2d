"""Streaming readers of Parquet files and Hugging Face datasets, whose Arrow batches become rows of Python values.

A value that Python cannot represent makes only its own cell unreadable, not the row or the batch.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

from proper.config import DataConfig
from proper.data.rows import Row, Source
from proper.data.values import OUT_OF_RANGE, Rounded, Unreadable
from proper.errors import DataError, did_you_mean, first_line
from proper.extras import needs_extra

_BATCH = 1024


def parquet_source(file: Path) -> Source:
    """Open a Parquet file; rows are numbered from 1.

    Raises:
        DataError: the file cannot be read.
    """
    import pyarrow as arrow  # not at the top: takes half a second to import
    import pyarrow.parquet as parquet

    try:
        columns = tuple(parquet.read_schema(file).names)
    except (OSError, arrow.ArrowException) as error:
        raise DataError(f"{file}: not readable as Parquet: {first_line(error)}") from error

    def read(wanted: Sequence[str]) -> Iterator[tuple[int, Row | str]]:
        number = 0
        try:
            # Old writers store times as INT96, which in nanoseconds would wrap around beyond the year 2262.
            with parquet.ParquetFile(file, buffer_size=1 << 20, coerce_int96_timestamp_unit="us") as opened:
                for batch in opened.iter_batches(_BATCH, columns=list(wanted), use_threads=False):
                    for row in table_rows(batch):
                        number += 1
                        yield number, row
        except (OSError, arrow.ArrowException) as error:
            raise DataError(f"{file}: cannot be read after row {number}: {first_line(error)}") from error

    return Source(str(file), columns, read)


def is_saved_dataset(folder: Path) -> bool:
    """Return whether `save_to_disk` of a Hugging Face dataset wrote the folder."""
    return folder.is_dir() and any((folder / name).is_file() for name in ("state.json", "dataset_dict.json"))


def huggingface_source(config: DataConfig, path: Path) -> Source:
    """Open a Hugging Face dataset: a folder that `save_to_disk` wrote, a folder of files, or a name on the hub.

    Raises:
        DataError: the dataset cannot be read, has no part `data.part`, or is a saved one that has no configurations.
        MissingExtraError: the extra `data` is not installed.
    """
    missing = "" if path.exists() else "no such file or folder, and "
    with needs_extra("data", f"{config.path}: {missing}reading a Hugging Face dataset"):
        import datasets

    try:
        if is_saved_dataset(path):
            dataset = datasets.load_from_disk(str(path))
            _require_no_choice(config, dataset)
        else:
            name = str(path) if path.is_dir() else config.path
            dataset = datasets.load_dataset(name, config.name, split=config.part, streaming=True)
        if isinstance(dataset, dict):
            if config.part not in dataset:
                raise DataError(
                    f"{config.path}: no part '{config.part}' (data.part); {did_you_mean(config.part, [*dataset])}"
                )
            dataset = dataset[config.part]
        columns = dataset.column_names or list(next(iter(dataset), {}))
    except DataError:
        raise
    # The hub's client raises dozens of exception types, its own and those of its dependencies.
    except Exception as error:
        message = f"{config.path}: {missing}not readable as a Hugging Face dataset: {first_line(error)}"
        raise DataError(message) from error
    return Source(config.path, tuple(columns) or None, lambda wanted: _dataset_rows(dataset, wanted, config.path))


def _require_no_choice(config: DataConfig, saved: Any) -> None:
    """Raise DataError if the config chooses a part or configuration that a saved data set does not have."""
    if config.name is not None:
        raise DataError(f"data.name: {config.name!r}: {config.path} is a saved data set, which has no configurations")
    usual = DataConfig.model_fields["part"].default
    if not isinstance(saved, dict) and config.part not in (usual, str(saved.split)):
        raise DataError(f"data.part: {config.part!r}: {config.path} is one data set without parts")


def _dataset_rows(dataset: Any, wanted: Sequence[str], name: str) -> Iterator[tuple[int, Row | str]]:
    features = dataset.features or {}
    labelled = {column: features[column] for column in wanted if column in features and _has_labels(features[column])}
    number = 0
    try:
        arrow = dataset.select_columns(list(wanted)).with_format("arrow")
        for batch in arrow.iter(batch_size=_BATCH):
            for row in table_rows(batch):
                number += 1
                for column, feature in labelled.items():
                    row[column] = _with_names(row[column], feature)
                yield number, row
    # As above: the exception types depend on where the dataset is stored.
    except Exception as error:
        raise DataError(f"{name}: cannot be read after row {number}: {first_line(error)}") from error


def _parts(feature: Any) -> list[Any]:
    """Return the features that a feature of a list or a struct consists of; none for any other."""
    if isinstance(feature, dict):
        return list(feature.values())
    if isinstance(feature, list):
        return feature
    inner = getattr(feature, "feature", None)
    return [] if inner is None else [inner]


def _has_labels(feature: Any) -> bool:
    """Return whether a feature is a `ClassLabel`, which maps numbers to names, or a list or struct with one."""
    return hasattr(feature, "int2str") or any(map(_has_labels, _parts(feature)))


def _with_names(value: Any, feature: Any) -> Any:
    """Return a cell with the names of its labels in place of their numbers; -1 stands for a missing label."""
    if hasattr(feature, "int2str"):
        if value in (None, -1):
            return None
        names = feature.names
        return names[value] if 0 <= value < len(names) else Unreadable(f"label {value}, of {len(names)} labels from 0")
    if isinstance(value, dict) and isinstance(feature, dict):
        return {key: _with_names(each, feature.get(key)) for key, each in value.items()}
    if isinstance(value, list) and (parts := _parts(feature)):
        return [_with_names(each, parts[0]) for each in value]
    return value


def table_rows(batch: Any) -> Iterator[Row]:
    """Turn an Arrow batch or table into rows of plain values."""
    names = batch.schema.names
    columns = [_plain_column(column) for column in batch.columns]
    for values in zip(*columns, strict=True):
        yield dict(zip(names, values, strict=True))


def _plain_column(column: Any) -> list[Any]:
    # A column of a table is chunked; a column of a record batch is a single array.
    return [value for chunk in getattr(column, "chunks", [column]) for value in _plain_array(chunk)]


def _plain_array(array: Any) -> list[Any]:
    import pyarrow as arrow  # not at the top: takes half a second to import

    kind = array.type
    if arrow.types.is_dictionary(kind):
        values = _plain_array(array.dictionary)
        return [None if index is None else values[index] for index in array.indices.to_pylist()]
    if arrow.types.is_list(kind) or arrow.types.is_large_list(kind) or arrow.types.is_fixed_size_list(kind):
        parts, sizes = iter(_plain_array(array.flatten())), array.value_lengths().to_pylist()
        return [None if size is None else list(islice(parts, size)) for size in sizes]
    if arrow.types.is_struct(kind) and len({field.name for field in kind}) == kind.num_fields > 0:
        return _plain_structs(array)
    if arrow.types.is_float32(kind) or arrow.types.is_float16(kind):
        exact = 2.0**24 if arrow.types.is_float32(kind) else 2.0**11
        return [None if value is None else _short_float(value, exact) for value in _scalars(array)]
    if arrow.types.is_timestamp(kind) and kind.unit == "ns":
        # Python's datetime stops at microseconds. Nanoseconds end in 2262, so nothing can go out of range here.
        array = array.cast(arrow.timestamp("us", kind.tz), safe=False)
    if arrow.types.is_timestamp(kind) and not _has_zone(kind):
        array = array.cast(arrow.timestamp(array.type.unit, "+00:00"))
    return _values(array)


def _plain_structs(array: Any) -> list[Any]:
    names = [field.name for field in array.type]
    rows = zip(*map(_plain_array, array.flatten()), strict=True)
    missing = array.is_null().to_pylist()
    return [None if gone else dict(zip(names, row, strict=True)) for gone, row in zip(missing, rows, strict=True)]


def _has_zone(kind: Any) -> bool:
    """Return whether this system knows the time zone of a type; small containers have no database of zones."""
    import pyarrow as arrow

    try:
        arrow.scalar(0, kind).as_py()
    except (ValueError, KeyError):
        return False
    return True


def _values(array: Any) -> list[Any]:
    """Return an array's values; values that Python cannot represent (year 10000, invalid UTF-8) as `Unreadable`."""
    try:
        return array.to_pylist()  # type: ignore[no-any-return]
    except (ValueError, OverflowError):
        return [_value(scalar) for scalar in array]


def _value(scalar: Any) -> Any:
    import pyarrow as arrow

    try:
        return scalar.as_py()
    except UnicodeDecodeError:
        return Unreadable("not UTF-8")
    except (ValueError, OverflowError) as error:
        if arrow.types.is_temporal(scalar.type):
            return Unreadable(OUT_OF_RANGE)
        return Unreadable(f"a value of type {scalar.type} that cannot be read ({first_line(error)})")


def _short_float(value: Any, exact: float) -> float:
    """Return the shortest decimal that parses to the same float: 3.3, not 3.299999952316284, for a float32."""
    short = float(str(value))
    return short if abs(short) < exact else Rounded(short)


def _scalars(array: Any) -> Iterator[Any]:
    values, missing = array.to_numpy(zero_copy_only=False), array.is_null().to_pylist()
    return (None if gone else value for value, gone in zip(values, missing, strict=True))
