"""Deleting a person, and saying all that there is of them: over every place that `places` knows.

Knows the order of things, not what the files look like.
"""

from __future__ import annotations

import sqlite3
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

from proper.adapters.store import DEFAULT_TENANT, AdapterStore
from proper.errors import InputError, StoreError
from proper.files import links_out_of
from proper.people.log import InteractionLog
from proper.people.places import UNFINISHED, files_of, folders, remove_quarantine, remove_work, run_home
from proper.sqlite_files import read_only_error


def remove(store: AdapterStore, log: InteractionLog, user: str) -> bool:
    """Remove all of a user of the store's tenant from the run; return whether the store or the log had anything.

    Gone from every file when it returns. The log's transaction ends last of all: a kill before that leaves a user who
    can be deleted again; and no fit can bring them back.

    Raises:
        InputError: a stage is being trained on the run's users, this one among them.
        StoreError: a file cannot be written, or a symbolic link leads out of the run folder.
    """
    run = run_home(store.folder.parent)
    if store.manifest.read_only:
        raise read_only_error(store.manifest.path)
    if away := links_out_of(run):
        raise StoreError(f"{away[0]}: is a symbolic link out of the run folder and is not followed; remove it first")
    if store.tenant == DEFAULT_TENANT:
        _require_rest(run, user)
        for place, path in files_of(run):
            try:
                place.remove(path, user)
            except OSError as error:
                raise StoreError(f"{path}: cannot be written: {error.strerror or error}") from error
    for folder in folders(run):
        if folder / "users" != store.folder and (folder / "users" / "users.sqlite").is_file():
            with _both(folder / "users", store.tenant) as (theirs, logged):
                _remove(theirs, logged, user)
    return _remove(store, log, user)


def _remove(store: AdapterStore, log: InteractionLog, user: str) -> bool:
    with log.deleting(store.tenant, user) as logged:
        stored = store.delete(user)
    if logged.fitting:
        # Whoever fits them finds the claim void at the next step, and lets go.
        with log.queue.lock():
            pass
    remove_work(store.folder, store.tenant, user)
    remove_quarantine(store.folder)
    return logged.known or stored


@contextmanager
def _both(folder: Path, tenant: str) -> Iterator[tuple[AdapterStore, InteractionLog]]:
    """Open a store and its log for a moment."""
    with closing(AdapterStore(folder, tenant)) as store, closing(InteractionLog(folder)) as log:
        yield store, log


def _require_rest(run: Path, user: str) -> None:
    """See that no stage is being trained that the user is part of."""
    busy = next((folder / name for folder in folders(run) for name in UNFINISHED if (folder / name).exists()), None)
    if busy is not None and any(True for _ in run_rows(run, user)):
        raise InputError(f"{busy}: a stage is being trained and holds user {user!r}; let the run end, then delete them")


def run_rows(run: Path, user: str) -> Iterator[dict[str, Any]]:
    """Yield every row that the run's own data has of a user, queries included, oldest first."""
    path = run / "data.sqlite"
    if not path.is_file():
        return
    with closing(sqlite3.connect(f"{path.absolute().as_uri()}?mode=ro", uri=True)) as data:
        rows = data.execute(
            """SELECT r.part, r.time, t.prompt, t.target, t.item FROM rows r JOIN texts t ON t.id = r.text
            WHERE r.user = (SELECT number FROM users WHERE id = ?) ORDER BY r.id""",
            (user,),
        )
        for part, time, prompt, target, item in rows:
            yield {"source": "run", "part": part, "prompt": prompt, "target": target, "timestamp": time, "item": item}


def logged_rows(log: InteractionLog, tenant: str, user: str) -> Iterator[dict[str, Any]]:
    """Yield every interaction that the log has of a user, in the order of arrival."""
    for each in log.interactions(tenant, user):
        own = {"id": each.id, "prompt": each.prompt, "target": each.target, "timestamp": each.time}
        yield {"source": "log", **own, "received": each.received}
