"""Move of a run's state between SQLite files of its folder and PostgreSQL: `proper move-state`.

All rows, tombstones and API keys are copied to the new place and compared; then one atomic write (`database.json`)
makes it the run's, and the old place is emptied, because a deletion would not reach it. Before anything is made,
`moving.json` records both places: after a kill, the next call removes the one that is not the run's.
"""

from __future__ import annotations

import os
import secrets
import shutil
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, closing, contextmanager, nullcontext, suppress
from dataclasses import asdict
from pathlib import Path

from sqlalchemy import MetaData

from proper.adapters.manifest import Manifest
from proper.adapters.tombstones import Tombstones
from proper.databases.copying import copy_tables
from proper.databases.location import POSTGRESQL, Location, checked, is_made, location_of
from proper.databases.setup import drop_state
from proper.databases.shared import SharedDatabase, open_run
from proper.databases.tables import LOG, STORE
from proper.errors import ProperError, RunFolderError, StoreError
from proper.extras import needs_extra
from proper.files import hidden_folder, locked, private_folder, wipe_file, write_json
from proper.interactions.database import Database
from proper.json_records import read_record
from proper.run_folder import RunFolder, require_run
from proper.run_lock import exclusive
from proper.serving.key_entries import entries_of

_PATIENCE = 2.0
"""Seconds to wait for other processes that use the run."""


def move_state(run: Path, url: str | None, advance: Callable[[int], None] = lambda count: None) -> int:
    """Move the state of a run; return the number of copied rows, 0 if it is there already.

    Args:
        run: the run folder.
        url: `postgresql://USER@HOST/DATABASE`; None for SQLite files in the run folder.
        advance: called with the number of rows that were copied since the last call.

    Raises:
        InputError: the URL is no PostgreSQL URL, or PostgreSQL cannot hold a text.
        RunFolderError: the folder is not a run, or another process uses it.
        StoreError: a database cannot be read or written; the state is where it was.
    """
    folder = require_run(run)
    if url is not None:
        checked(url, f"{POSTGRESQL}, or 'folder'")
    with _alone(folder):
        _finish(folder)
        old = location_of(folder.users.path)
        if url == (None if old is None else old.url):
            return 0
        new = None if url is None else Location(url, f"proper_{secrets.token_hex(8)}")
        if new is not None:
            drop_state(new)  # not there yet: fails before anything is recorded if the server cannot be reached
        write_json(folder.moving, {"from": _values(old), "to": _values(new)})
        try:
            with hidden_folder(folder.database) as draft, _opened(folder) as opened:
                count = _copy(folder, RunFolder(draft), opened, new, advance)
                _switch(folder, RunFolder(draft), new)
                # Before the locks are released: who waited for them must not write here any more.
                if old is None:
                    _wipe_files(folder)
                else:
                    opened[0][0].write(f'DROP SCHEMA "{old.schema}" CASCADE')
        except BaseException:
            with suppress(ProperError):  # the next call does it
                _finish(folder)
            raise
        _finish(folder)
        return count


@contextmanager
def _alone(folder: RunFolder) -> Iterator[None]:
    private_folder(folder.users.path)
    with (
        exclusive(folder.path),
        locked(folder.writers_lock, patience=_PATIENCE) as writes,
        locked(folder.users.fits_lock, patience=0) as fits,
    ):
        if writes is None or fits is None:
            raise RunFolderError(f"{folder.path}: another process works in it; stop its server and workers")
        old = location_of(folder.users.path)
        with nullcontext() if old is None else _connected_alone(old):
            yield


@contextmanager
def _opened(folder: RunFolder) -> Iterator[list[tuple[SharedDatabase, MetaData]]]:
    """Yield the open databases of a run, each with its tables; no other process can write to them inside the block.

    In PostgreSQL, one connection reads all tables, and can therefore drop them.
    """
    with ExitStack() as stack:
        found = list[tuple[SharedDatabase, MetaData]]()
        if is_made(folder.users.log):
            log = stack.enter_context(closing(Database(folder.users.log, wait_seconds=_PATIENCE)))
            found.append((log, LOG))
        if is_made(folder.users.manifest):
            manifest = stack.enter_context(closing(Manifest(folder.users.manifest, _PATIENCE)))
            found.append((manifest, STORE))
        databases = [database for database, _ in found]
        if (run := open_run(folder.path)) is not None:
            databases.append(stack.enter_context(closing(run)))
            found = [(databases[0], tables) for _, tables in found]
        for database in databases:
            if database.engine == "sqlite":
                _require_alone(database)
            stack.enter_context(database.transaction())
        yield found


def _require_alone(database: SharedDatabase) -> None:
    """Require that no other process has an SQLite file open: only then it can leave the mode WAL."""
    try:
        ((mode,),) = database.read("PRAGMA journal_mode = DELETE")
    except StoreError:
        mode = "wal"
    if mode != "delete":
        raise RunFolderError(f"{database.path}: another process has it open; stop the run's server and commands")


def _copy(
    folder: RunFolder,
    draft: RunFolder,
    opened: list[tuple[SharedDatabase, MetaData]],
    new: Location | None,
    advance: Callable[[int], None],
) -> int:
    """Copy everything to the new place, which the folder `draft` points to or holds; return the number of rows."""
    if new is not None:
        from proper.databases.postgresql.database import make_schema

        make_schema(new)
        write_json(draft.database, asdict(new))
    count = 0
    for source, tables in opened:
        made = Database(draft.users.log) if tables is LOG else Manifest(draft.users.manifest, _PATIENCE)
        with closing(made) as target, target.transaction():
            count += copy_tables(source, target, tables, advance)
            if tables is LOG:  # a worker that died before the move has no lease
                target.write("UPDATE fits SET lease = 0 WHERE state = 'fitting'")
    Tombstones(folder.users.path).copy_to(Tombstones(draft.users.path))
    with closing(entries_of(folder.keys)) as keys, closing(entries_of(draft.keys)) as copies:
        if keys.required():
            with copies.changing():
                copies.write(list(keys.read().values()))
    return count


def _switch(folder: RunFolder, draft: RunFolder, new: Location | None) -> None:
    """Make the new place the run's."""
    if new is not None:
        write_json(folder.database, asdict(new))
        return
    names = (draft.users.manifest, draft.users.log, draft.tombstones, draft.keys, draft.keys_required)
    for path in (each for each in names if each.exists()):
        place = folder.path / path.relative_to(draft.path)
        private_folder(place.parent)
        os.replace(path, place)
    folder.database.unlink()


def _connected_alone(place: Location) -> AbstractContextManager[None]:
    with needs_extra("postgresql", f"the schema in {place}"):
        from proper.databases.postgresql.connections import alone
    return alone(place)


def _finish(folder: RunFolder) -> None:
    """Remove the place of a move that is not the run's: the old one after the switch, the new one before."""
    if not folder.moving.exists():
        return
    place = (dict, type(None))  # None: the SQLite files of the folder
    found = read_record(folder.moving, "restore a copy of it", **{"from": place, "to": place})
    now = _values(location_of(folder.users.path))
    other = found["from"] if now == found["to"] else found["to"]
    if other is None:
        _wipe_files(folder)
    else:
        drop_state(Location(**other))
    folder.moving.unlink()


def _wipe_files(folder: RunFolder) -> None:
    """Overwrite and remove the SQLite files, and remove tombstones and keys."""
    for path in (folder.users.manifest, folder.users.log):
        for each in (path, *(path.with_name(path.name + end) for end in ("-wal", "-shm", "-journal"))):
            wipe_file(each)
    if folder.tombstones.exists():
        shutil.rmtree(folder.tombstones)
    for path in (folder.keys, folder.keys_required):
        path.unlink(missing_ok=True)


def _values(place: Location | None) -> dict[str, str] | None:
    return None if place is None else asdict(place)
