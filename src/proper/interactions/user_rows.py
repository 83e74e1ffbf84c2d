"""The users of a run and their rows, read from its prepared data, its adapter store and its interaction log."""

from __future__ import annotations

import sqlite3
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

from proper.adapters.manifest import Manifest, user_of
from proper.adapters.store import WAIT_SECONDS
from proper.data.chat import readable
from proper.databases.location import is_made
from proper.errors import StoreError
from proper.interactions.log import InteractionLog
from proper.run_folder import RunFolder, UsersFolder
from proper.sqlite_files import open_to_read


def run_rows(run: Path, user: str) -> Iterator[dict[str, Any]]:
    """Yield every row of a user in the run's own data, queries included, oldest first."""
    path = RunFolder(run).data
    if not path.is_file():
        return
    with _prepared(path) as data:
        rows = data.execute(
            """SELECT r.id, r.part, r.time, t.prompt, t.target, t.item FROM rows r JOIN texts t ON t.id = r.text
            WHERE r.user = (SELECT number FROM users WHERE id = ?) ORDER BY r.id""",
            (user,),
        )
        for row, part, time, prompt, target, item in rows:
            texts = {"prompt": readable(prompt), "target": target, "timestamp": time, "item": item}
            yield {"source": "run", "row": row, "part": part, **texts}


def logged_rows(log: InteractionLog, tenant: str, user: str) -> Iterator[dict[str, Any]]:
    """Yield every logged interaction of a user, in the order of arrival."""
    for each in log.interactions(tenant, user):
        own = {"id": each.id, "prompt": readable(each.prompt), "target": each.target, "timestamp": each.time}
        yield {"source": "log", **own, "received": each.received}


def users_of_data(path: Path) -> set[str]:
    """Return the users of prepared data."""
    with _prepared(path) as data:
        return {user_of(key) for (key,) in data.execute("SELECT CAST(id AS BLOB) FROM users")}


def users_of_stores(users: Path) -> set[tuple[str, str]]:
    """Return tenant and id of every user in the store or the log of a folder."""
    paths, found = UsersFolder(users), list[tuple[str, bytes]]()
    if is_made(paths.manifest):
        with closing(Manifest(paths.manifest, WAIT_SECONDS)) as manifest:
            found += manifest.owners_of_records()
    if is_made(paths.log):
        with closing(InteractionLog(users)) as log:
            found += log.owners()
    return {(tenant, user_of(key)) for tenant, key in found}


@contextmanager
def _prepared(path: Path) -> Iterator[sqlite3.Connection]:
    """Open prepared data to read; SQLite's errors inside the block become StoreError, which names the file."""
    try:
        with closing(open_to_read(path)) as data:
            yield data
    except sqlite3.Error as error:
        raise StoreError(f"{path}: cannot be read: {error}") from error
