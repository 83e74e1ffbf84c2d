"""Tolerant JSON reading: missing or mistyped values become empty, non-finite numbers None."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from proper.errors import RunFolderError
from proper.json_records import number as number


def read_object(path: Path) -> dict[str, Any]:
    """Return the object of a JSON file; empty if the file does not exist.

    Raises:
        RunFolderError: the file is not one JSON object.
    """
    if not path.is_file():
        return {}
    try:
        value = json.loads(path.read_text(encoding="utf-8"), parse_constant=_nothing)
    except json.JSONDecodeError as error:
        raise RunFolderError(f"{path}:{error.lineno}: not readable as JSON: {error.msg}") from error
    except (ValueError, RecursionError) as error:
        raise RunFolderError(f"{path}: not readable as JSON: {error}") from error
    if not isinstance(value, dict):
        raise RunFolderError(f"{path}: holds a {type(value).__name__}, not a JSON object")
    return value


def read_lines(path: Path) -> Iterator[dict[str, Any]]:
    """Stream the objects of a JSONL file; none if it does not exist.

    A last line without a newline was truncated during writing and is skipped.

    Raises:
        RunFolderError: another line is not a JSON object.
    """
    if not path.is_file():
        return
    with path.open("rb") as file:
        for number_, line in enumerate(file, start=1):
            if not line.strip():
                continue
            try:
                value = json.loads(line.decode("utf-8"), parse_constant=_nothing)
            except (ValueError, RecursionError) as error:
                if not line.endswith(b"\n"):
                    return
                why = getattr(error, "msg", error)
                raise RunFolderError(f"{path}:{number_}: not readable as JSON: {why}") from error
            if not isinstance(value, dict):
                raise RunFolderError(f"{path}:{number_}: a line is one JSON object")
            yield value


def count(value: Any) -> int | None:
    """Return `value` as an int (of a list: its length), or None."""
    if isinstance(value, list):
        return len(value)
    finite = number(value)
    return None if finite is None else int(finite)


def objects(value: Any) -> list[dict[str, Any]]:
    """Return the mappings of a list; empty for any other value."""
    return [row for row in value if isinstance(row, dict)] if isinstance(value, list) else []


def mapping(value: Any) -> dict[str, Any]:
    """Return `value` if it is an object, else an empty one."""
    return value if isinstance(value, dict) else {}


def interval(value: Any) -> tuple[float, float] | None:
    """Return a pair of finite floats, or None."""
    if not isinstance(value, list) or len(value) != 2:
        return None
    low, high = number(value[0]), number(value[1])
    return None if low is None or high is None else (low, high)


def _nothing(_: str) -> None:
    """Return None for NaN and Infinity, which Python writes although JSON does not have them."""
