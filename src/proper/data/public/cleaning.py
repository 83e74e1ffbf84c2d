"""Cleaning shared by the public data sets: masked addresses, user ids without names, Parquet files with checksums."""

from __future__ import annotations

import html
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from proper.data.public.download import add_sum
from proper.files import atomic_path, hash_file

_EMAIL = re.compile(r"<?[\w.+-]+@[\w-]+(\.[\w-]+)+>?")
_URL = re.compile(r"\b(?:https?|ftp|git)://[\w\[]\S*")
_PHONE = re.compile(r"(?<![\w.-])(?:\+?1[-. ]?)?(?:\(\d{3}\) ?|\d{3}[-. ])\d{3}[-. ]\d{4}(?![\w-])")


def mask_addresses(text: str) -> str:
    """Replace e-mail addresses by `[email]` and URLs by `[url]`."""
    return _EMAIL.sub("[email]", _URL.sub("[url]", text))


def clean_text(text: str) -> str:
    """Decode HTML entities, join white space, and mask e-mail addresses, URLs and North-American phone numbers."""
    return _PHONE.sub("[phone]", mask_addresses(" ".join(html.unescape(text).split())))


def numbered_users(rows: Mapping[str, int]) -> dict[str, str]:
    """Return user ids without names: `u0000` for the name with the most rows, ties in the names' order."""
    ordered = sorted(rows, key=lambda name: (-rows[name], name))
    return {name: f"u{number:04d}" for number, name in enumerate(ordered)}


def write_parquet(path: Path, rows: Iterable[Mapping[str, Any]], schema: pa.Schema) -> int:
    """Write rows as zstd Parquet, atomically, and its checksum into `SHA256SUMS`; return the number of rows.

    Raises:
        ProperError: the file cannot be written.
    """
    table = pa.Table.from_pylist(list(rows), schema=schema)
    with atomic_path(path, shared=True) as temporary:
        pq.write_table(table, temporary, compression="zstd")
        # The checksum first, as after a download: a file that is there is always listed.
        add_sum(path, hash_file(temporary))
    return int(table.num_rows)


def text_schema(*columns: str, **typed: pa.DataType) -> pa.Schema:
    """Return a schema of text columns, except those with a type in `typed`, in the order of `columns`."""
    return pa.schema([(column, typed.get(column, pa.string())) for column in columns])
