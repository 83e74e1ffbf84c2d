"""Reads files of interactions for the tests of their formats, and writes packed ones."""

from __future__ import annotations

import bz2
import gzip
import json
import lzma
from pathlib import Path
from typing import Any

import pyarrow as arrow
import pytest

from proper.config import DataConfig
from proper.data.interactions import BadRows, Interaction, read_interactions
from proper.errors import DataError

ROW = {"user_id": "u", "input": "in", "output": "out"}


def read(path: Path | str, **settings: Any) -> list[Interaction]:
    bad = BadRows()
    found = list(read_interactions(DataConfig(path=str(path), **settings), bad))
    assert bad == BadRows()
    return found


def lines(*rows: dict[str, Any]) -> bytes:
    return b"".join(json.dumps(row).encode() + b"\n" for row in rows)


def refused(path: Path | str, **settings: Any) -> str:
    with pytest.raises(DataError) as caught:
        read(path, **settings)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def complaints(path: Path) -> list[str]:
    bad = BadRows()
    list(read_interactions(DataConfig(path=str(path)), bad))
    return [message.removeprefix(f"{path}:") for message in bad.first]


def packed(path: Path, body: bytes) -> None:
    """Write a file packed as its name says."""
    if path.suffix == ".zst":
        with arrow.output_stream(str(path), compression="zstd") as file:
            file.write(body)
        return
    pack = {".gz": gzip.compress, ".bz2": bz2.compress, ".xz": lzma.compress}.get(path.suffix, bytes)
    path.write_bytes(pack(body))
