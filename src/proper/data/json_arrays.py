"""Streaming reader of JSON arrays in files: memory grows with the largest entry, not with the file."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import ijson

from proper.errors import DataError


def json_entries(path: Path, where: str = "item") -> Iterator[tuple[int, Any]]:
    """Yield (number from 1, entry) of the array at ijson path `where`; "item" means that the file is one array.

    Raises:
        DataError: the file cannot be read or is not JSON; the message names the last good entry.
    """
    number = 0
    try:
        with path.open("rb") as file:
            for entry in ijson.items(file, where, use_float=True):
                number += 1
                yield number, entry
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error.strerror or error}") from error
    except (ijson.JSONError, UnicodeDecodeError) as error:
        place = f" after entry {number}" if number else ""
        raise DataError(f"{path}: not readable as JSON{place}: {_first_line(error)}") from error


def json_value(path: Path, key: str) -> Any:
    """Return the value of one key of a file that is a JSON object; None if the key is missing.

    Raises:
        DataError: as in `json_entries`.
    """
    return next((value for _, value in json_entries(path, key)), None)


def _first_line(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]
