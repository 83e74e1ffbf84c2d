"""Where a repair puts what it takes out of a store: it may still be somebody's, so it is kept until a user is deleted.

Knows nothing about what is wrong with it.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from proper.files import atomic_path, private_folder, write_json

QUARANTINE = "quarantine"
"""The folder beside a store's manifest. Whose its files are cannot be told, so a deletion removes all of them."""


def put_file_aside(users: Path, path: Path) -> str:
    """Move a file (or a link, which is not followed) there; return what was done."""
    target = _place(users, path.name)
    os.rename(path, target)
    return f"moved to {target}"


def put_bytes_aside(users: Path, file: int, name: str, start: int, end: int) -> None:
    """Copy a range of an open file there."""
    target = _place(users, f"{name}.{start}-{end}")
    with atomic_path(target) as temporary, temporary.open("wb") as copy:
        for at in range(start, end, 1 << 20):
            copy.write(os.pread(file, min(1 << 20, end - at), at))


def put_row_aside(users: Path, row: Mapping[str, Any]) -> None:
    """Write a row of the manifest there as JSON, bytes as hexadecimal digits."""
    told = {key: value.hex() if isinstance(value, bytes) else value for key, value in row.items()}
    # NaN is no JSON, and a damaged row may hold anything.
    write_json(_place(users, "row.json"), json.loads(json.dumps(told, default=str), parse_constant=str))


def _place(users: Path, name: str) -> Path:
    """Return a path in the quarantine that nothing has."""
    folder = users / QUARANTINE
    private_folder(folder)
    taken = sum(1 for _ in folder.iterdir())
    while os.path.lexists(path := folder / f"{taken:06}-{name}"):
        taken += 1
    return path
