"""Copies of deleted rows in the unused space of an SQLite file are found, and rows in use are not taken for them."""

from __future__ import annotations

import random
import sqlite3
from contextlib import closing
from pathlib import Path

import pytest

from proper.adapters.store import AdapterStore
from proper.databases import sqlite
from proper.databases.unused_space import is_in_unused_space
from proper.interactions.deletion import remove
from proper.interactions.log import InteractionLog, LogEntry


@pytest.mark.parametrize("page_size", [512, 4096, 65536])
def test_all_unused_bytes_are_searched_and_no_byte_in_use(tmp_path: Path, page_size: int) -> None:
    """Every text is in use or not by SQLite's own account: what VACUUM keeps is in use, the rest is not."""
    path, draw = tmp_path / "x", random.Random(page_size)
    names = [f"user-{draw.randrange(10**9):09d}" for _ in range(400)]
    with closing(sqlite3.connect(path, isolation_level=None)) as database:
        database.execute(f"PRAGMA page_size = {page_size}")
        database.execute("PRAGMA secure_delete = OFF")
        database.execute("CREATE TABLE a(name TEXT, filling BLOB, PRIMARY KEY (name)) WITHOUT ROWID")
        database.execute("CREATE TABLE b(name TEXT UNIQUE, filling BLOB)")
        for name in names:
            filling = bytes(draw.choice([10, 60, 300, 3 * page_size]))
            for table in "ab":
                database.execute(f"INSERT INTO {table} VALUES (?, ?)", (name, filling))
        gone = set(names[::2])
        for name in gone:
            database.execute("DELETE FROM a WHERE name = ?", (name,))
            database.execute("DELETE FROM b WHERE name = ?", (name,))
    raw = path.read_bytes()
    left = {name for name in gone if name.encode() in raw}
    assert left, "nothing was left behind: the test shows nothing"
    for name in draw.sample(sorted(left), min(6, len(left))):
        assert is_in_unused_space(path, name)
    for name in draw.sample(sorted(gone - left), min(5, len(gone - left))):
        assert not is_in_unused_space(path, name)
    with closing(sqlite3.connect(path, isolation_level=None)) as database:
        database.execute("PRAGMA secure_delete = ON")
        database.execute("VACUUM")
    raw = path.read_bytes()
    for name in draw.sample(sorted(set(names) - gone), 5):
        assert name.encode() in raw and not is_in_unused_space(path, name)


def test_an_id_that_is_part_of_other_ids_rebuilds_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "config.yaml").write_text("{}")
    users, rebuilt, rebuild = tmp_path / "users", list[int](), sqlite._rebuilt

    def counted(database: sqlite3.Connection) -> bool:
        rebuilt.append(1)
        return rebuild(database)

    monkeypatch.setattr(sqlite, "_rebuilt", counted)
    with closing(AdapterStore(users)) as store, closing(InteractionLog(users)) as log:
        for user in ("u1", "u10", "u11", "u100"):
            log.append("", user, [LogEntry("of u1 or u10", "x")], new=True)
        assert not remove(store, log, "u1").waits
        assert not rebuilt, "nothing of the user was left, and the row about the deletion is one in use"
        assert log.knows("", "u10") and not log.knows("", "u1")
