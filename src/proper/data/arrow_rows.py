"""Conversion of Arrow batches to rows of plain Python values.

A value that Python cannot represent makes only its own cell unreadable, not the row or the batch.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from proper.data.source import Row
from proper.data.templates import Rounded, Unreadable
from proper.data.times import OUT_OF_RANGE


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
    import pyarrow as arrow  # noqa: PLC0415 - half a second that JSONL need not pay

    kind = array.type
    if arrow.types.is_dictionary(kind):
        values = _plain_array(array.dictionary)
        return [None if index is None else values[index] for index in array.indices.to_pylist()]
    if arrow.types.is_float32(kind) or arrow.types.is_float16(kind):
        exact = 2.0**24 if arrow.types.is_float32(kind) else 2.0**11
        return [None if value is None else _short_float(value, exact) for value in _scalars(array)]
    if arrow.types.is_timestamp(kind) and kind.unit == "ns":
        # Python's datetime stops at microseconds. Nanoseconds end in 2262, so nothing can go out of range here.
        array = array.cast(arrow.timestamp("us", kind.tz), safe=False)
    return _values(array)


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
        return Unreadable(f"a value of type {scalar.type} that cannot be read ({_first_line(error)})")


def _short_float(value: Any, exact: float) -> float:
    """Return the shortest decimal that parses to the same float: 3.3, not 3.299999952316284, for a float32."""
    short = float(str(value))
    return short if abs(short) < exact else Rounded(short)


def _scalars(array: Any) -> Iterator[Any]:
    values, missing = array.to_numpy(zero_copy_only=False), array.is_null().to_pylist()
    return (None if gone else value for value, gone in zip(values, missing, strict=True))


def _first_line(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]
