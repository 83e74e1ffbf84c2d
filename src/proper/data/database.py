"""SQLite database of a run's prepared data: schema, opening, metadata, and seeded shuffles inside SQL.

Texts are in a table apart from the narrow table that the split needs, so that splitting never moves text. Large sorts
and temporary tables spill to disk, so memory does not grow with the number of rows.
"""

from __future__ import annotations

import json
import sqlite3
from hashlib import blake2b
from pathlib import Path
from typing import Any

from proper.errors import RunFolderError
from proper.sqlite_files import open_to_read

VERSION = 1

SCHEMA = """
CREATE TABLE meta(key TEXT PRIMARY KEY, value TEXT NOT NULL) WITHOUT ROWID;
CREATE TABLE texts(id INTEGER PRIMARY KEY, prompt TEXT NOT NULL, target TEXT NOT NULL, item TEXT);
CREATE TABLE users(
    number INTEGER PRIMARY KEY, id TEXT NOT NULL UNIQUE,
    role TEXT NOT NULL DEFAULT 'other', timed INTEGER NOT NULL DEFAULT 0,
    history INTEGER NOT NULL DEFAULT 0, queries INTEGER NOT NULL DEFAULT 0);
-- In the order of (user, time, digest), so that `id` sorts a user's rows by time.
CREATE TABLE rows(
    id INTEGER PRIMARY KEY, text INTEGER NOT NULL, user INTEGER NOT NULL, time REAL, tokens INTEGER NOT NULL,
    digest BLOB NOT NULL, item_key INTEGER, prompt_key INTEGER NOT NULL,
    part TEXT NOT NULL DEFAULT 'history', reason TEXT);
"""
"""`digest` hashes user, prompt, target and time; `item_key` hashes the item, `prompt_key` the normalized prompt; `part`
is "history", "query" or "unused" (with `reason` set)."""

_CACHE_KIB = 8192


def create(path: Path) -> sqlite3.Connection:
    """Create a database for writing, without a journal: a failed build is discarded, never repaired."""
    connection = _open_unsafe(path)
    connection.executescript(SCHEMA)
    return connection


def copy(source: sqlite3.Connection, path: Path) -> sqlite3.Connection:
    """Copy a database into a new file for writing, like `create`."""
    connection = _open_unsafe(path)
    try:
        source.backup(connection)
    except sqlite3.Error:
        connection.close()
        raise
    return connection


def _open_unsafe(path: Path) -> sqlite3.Connection:
    connection = sqlite3.connect(path, isolation_level=None, check_same_thread=False)
    connection.execute("PRAGMA journal_mode = OFF")
    connection.execute("PRAGMA synchronous = OFF")
    _set_up(connection)
    return connection


def open_read_only(path: Path) -> sqlite3.Connection:
    """Open a prepared database.

    Raises:
        RunFolderError: the file is missing, not readable, or of another format version.
    """
    if not path.is_file():
        raise RunFolderError(f"{path}: no such file; `proper run` prepares it")
    try:
        connection = open_to_read(path)
    except sqlite3.DatabaseError as error:
        raise RunFolderError(f"{path}: not readable as prepared data: {error}") from error
    connection.isolation_level = None
    try:
        _set_up(connection)
        version = get_meta(connection, "version")
    except sqlite3.DatabaseError as error:
        connection.close()
        raise RunFolderError(f"{path}: not readable as prepared data: {error}") from error
    if version != VERSION:
        connection.close()
        raise RunFolderError(f"{path}: prepared by another version of proper (format {version}, not {VERSION})")
    return connection


def _set_up(connection: sqlite3.Connection) -> None:
    connection.execute("PRAGMA temp_store = FILE")
    # Not every build of SQLite overwrites what it deletes: duplicates would stay in free pages, beyond any deletion.
    connection.execute("PRAGMA secure_delete = ON")
    for schema in ("main", "temp"):
        connection.execute(f"PRAGMA {schema}.cache_size = -{_CACHE_KIB}")
    connection.create_function("scramble", 2, scramble, deterministic=True)


def set_meta(connection: sqlite3.Connection, key: str, value: Any) -> None:
    """Store a JSON-serializable value under `key`."""
    connection.execute("REPLACE INTO meta VALUES (?, ?)", (key, json.dumps(value, ensure_ascii=False)))


def get_meta(connection: sqlite3.Connection, key: str) -> Any:
    """Return the value that `set_meta` stored under `key`, or None."""
    found = connection.execute("SELECT value FROM meta WHERE key = ?", (key,)).fetchone()
    return json.loads(found[0]) if found else None


def salt(*parts: object) -> bytes:
    """Return a 16-byte hash of `parts`, the salt of one seeded order (see `scramble`)."""
    return blake2b(json.dumps([str(part) for part in parts]).encode(), digest_size=16).digest()


def scramble(key: bytes | int | str, salted: bytes) -> int:
    """Return a uniform signed 64-bit hash of a key; ordering by it in SQL is a seeded shuffle."""
    content = key if isinstance(key, bytes) else str(key).encode()
    return int.from_bytes(blake2b(content, digest_size=8, salt=salted).digest(), "little", signed=True)


def text_key(text: str) -> int:
    """Hash a text to a signed 64-bit number."""
    return int.from_bytes(blake2b(text.encode(), digest_size=8).digest(), "little", signed=True)
