"""Quarantine folder of a store: repair moves removed files, byte ranges and rows here.

They may still belong to a user, so they are kept until any user is deleted.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from proper.files import atomic_path, private_folder, write_json
from proper.run_folder import UsersFolder


def put_file_aside(users: Path, path: Path) -> str:
    """Move a file (or a symbolic link, which is not followed) into quarantine; return what was done, as text."""
    target = _place(users, path.name)
    os.rename(path, target)
    return f"moved to {target}"


def put_bytes_aside(users: Path, file: int, name: str, start: int, end: int) -> None:
    """Copy a range of an open file into quarantine."""
    target = _place(users, f"{name}.{start}-{end}")
    with atomic_path(target) as temporary, temporary.open("wb") as copy:
        for at in range(start, end, 1 << 20):
            copy.write(os.pread(file, min(1 << 20, end - at), at))


def put_row_aside(users: Path, row: Mapping[str, Any]) -> None:
    """Write a manifest row into quarantine as JSON, bytes as hexadecimal digits."""
    told = {key: value.hex() if isinstance(value, bytes) else value for key, value in row.items()}
    # JSON has no NaN, and a damaged row may contain any value.
    write_json(_place(users, "row.json"), json.loads(json.dumps(told, default=str), parse_constant=str))


def _place(users: Path, name: str) -> Path:
    """Return an unused path in the quarantine folder."""
    folder = UsersFolder(users).quarantine
    private_folder(folder)
    taken = sum(1 for _ in folder.iterdir())
    while os.path.lexists(path := folder / f"{taken:06}-{name}"):
        taken += 1
    return path
