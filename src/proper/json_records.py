"""JSON files of a run folder, read with the keys that their reader uses: a missing or mistyped one is named."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from proper.errors import ProperError, RunFolderError
from proper.files import read_json

NUMBER = (int, float)
"""The types of a JSON number."""
REMOVE_IT = "remove it, and 'proper evaluate' writes it again"
"""What to do about a damaged file that an evaluation writes."""


def read_record(path: Path, remedy: str = "restore a copy of it", /, **keys: type | tuple[type, ...]) -> dict[str, Any]:
    """Return the object of a JSON file.

    Args:
        path: the file.
        remedy: what to do about a damaged file, the end of the message.
        keys: the keys that the object must have, each with the type or the types of its value.

    Raises:
        RunFolderError: the file is missing, is no JSON object, or lacks a key; the message names file and key.
    """
    try:
        found = read_json(path)
    except ProperError as error:
        raise RunFolderError(f"{error}; {remedy}") from error
    if not isinstance(found, dict):
        raise RunFolderError(f"{path}: holds a {type(found).__name__}, not a JSON object; {remedy}")
    for key, kinds in keys.items():
        if key not in found:
            raise RunFolderError(f"{path}: key '{key}' is missing; {remedy}")
        if not _is(found[key], kinds if isinstance(kinds, tuple) else (kinds,)):
            raise RunFolderError(f"{path}: key '{key}' has a wrong value; {remedy}")
    return found


def number(value: Any) -> float | None:
    """Return a value as a finite float; None for anything else, true and false included."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    return float(value) if math.isfinite(value) else None


def first_problem(error: ValidationError) -> str:
    """Return the first problem that pydantic found in a JSON value, after the keys and indexes that lead to it."""
    found = error.errors()[0]
    at = ".".join(map(str, found["loc"]))
    return f"{at}: {found['msg']}" if at else str(found["msg"])


def _is(value: Any, kinds: tuple[type, ...]) -> bool:
    """Whether a value is of one of these types; in Python true and false are whole numbers, in JSON they are not."""
    return isinstance(value, kinds) and (bool in kinds or not isinstance(value, bool))
