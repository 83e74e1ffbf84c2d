"""Deletion of a user from every personal file of a run, and export of a user's rows; see `personal_files`.

A deletion first writes a row in the log's database (`deletions`) and a tombstone, then removes the data, and ends when
no byte is left. After a kill at any point the row remains; while another process reads or writes, the rest is
postponed. `finish_deletions` resumes it: at the start and end of every command that writes into the run, in a server,
and in `proper users check`. `delete_returned` deletes users again whom a backup brought back.
"""

from __future__ import annotations

import os
import shutil
import sqlite3
from collections.abc import Iterator
from contextlib import AbstractContextManager, closing, contextmanager, nullcontext, suppress
from dataclasses import dataclass
from pathlib import Path, PurePath
from typing import Any

from proper.adapters.manifest import Manifest, user_of
from proper.adapters.store import DEFAULT_TENANT, WAIT_SECONDS, AdapterStore
from proper.databases.location import is_made
from proper.errors import InputError, ProperError, StoreError
from proper.files import close_to_others, locked, sweep
from proper.interactions.deletion_jobs import Deletion
from proper.interactions.log import InteractionLog
from proper.interactions.personal_files import files_of, remove_quarantine, remove_work
from proper.run_folder import UNFINISHED, RunFolder, UsersFolder, nested_runs
from proper.sqlite_files import open_to_read, read_only_error

PATIENCE = 5.0
"""Seconds for which a deletion waits for other readers and writers."""


class TrainingError(InputError):
    """A stage is being trained on data of the user, who can be deleted after it."""


@dataclass(frozen=True)
class Removal:
    """The result of a deletion.

    Attributes:
        found: whether the store or the log knew the user.
        job: the id of the deletion in the log.
        waits: the reasons why bytes of the user remain, one line each; empty when all are gone.
    """

    found: bool
    job: str
    waits: tuple[str, ...] = ()


def remove(store: AdapterStore, log: InteractionLog, user: str, patience: float = PATIENCE) -> Removal:
    """Remove all data of a user of the store's tenant from the run; the result tells whether all bytes are gone.

    Nothing adds the user again: neither a running fit or evaluation, nor data that is prepared again.

    Raises:
        TrainingError: a stage is being trained on data that includes the user; nothing is changed.
        StoreError: the log cannot be written, or a symbolic link leads out of the run folder; nothing is changed.
    """
    run = RunFolder(store.folder.parent).home.path
    if store.manifest.read_only:
        raise read_only_error(store.manifest.path)
    if away := links_out_of(run):
        raise StoreError(f"{away[0]}: is a symbolic link out of the run folder and is not followed; remove it first")
    if store.tenant == DEFAULT_TENANT:
        _require_no_training(run, user)
    found = store.head(user) is not None or log.knows(store.tenant, user)
    deletion = log.deletions.begin(store.tenant, user)
    return Removal(found, deletion.job, tuple(_work(store, log, deletion, patience)))


def finish_deletions(users: Path, patience: float = 0.0) -> list[str]:
    """Resume all unfinished deletions of a store's folder; return why some remain unfinished, one line each."""
    if not is_made(UsersFolder(users).log) or not os.access(users, os.W_OK):
        return []
    waits = []
    with closing(InteractionLog(users)) as log:
        for deletion in log.deletions.pending():
            with closing(AdapterStore(users, deletion.tenant)) as store:
                waits += _work(store, log, deletion, patience)
    return waits


def delete_returned(users: Path, patience: float = 0.0) -> list[str]:
    """Delete the users again who have a tombstone and are in the run nevertheless: an older copy of a file came back.

    Returns why data of such users remains, one line each. Users whose deletion is unfinished are left to
    `finish_deletions`.
    """
    if not is_made(UsersFolder(users).manifest) or not os.access(users, os.W_OK):
        return []
    waits = list[str]()
    with closing(AdapterStore(users)) as store:
        if store.tombstones.of_tenant(DEFAULT_TENANT) is None:
            return []  # no user was deleted
    with closing(AdapterStore(users)) as store, closing(InteractionLog(users)) as log:
        pending = {(each.tenant, each.user) for each in log.deletions.pending()}
        for tenant, user in sorted(set(_returned(store)) - pending):
            with closing(AdapterStore(users, tenant)) as theirs:
                if not store.tombstones.has(tenant, user):
                    continue  # enrolled again since the list was made
                try:
                    waits += remove(theirs, log, user, patience).waits
                except (InputError, StoreError) as error:
                    waits.append(str(error))
    return waits


def _returned(store: AdapterStore) -> Iterator[tuple[str, str]]:
    """Yield tenant and user of everyone with a tombstone in a store, a log or the data, of seeds and variants too."""
    found = set[tuple[str, str]]()
    for folder in nested_runs(RunFolder(store.folder.parent).home.path):
        run = RunFolder(folder)
        found |= everyone(run.users.path)
        if run.data.is_file():
            with _prepared(run.data) as data:
                found |= {
                    (DEFAULT_TENANT, user_of(key)) for (key,) in data.execute("SELECT CAST(id AS BLOB) FROM users")
                }
    deleted = {tenant: store.tombstones.of_tenant(tenant) for tenant, _ in found}
    for tenant, user in found:
        is_deleted = deleted[tenant]
        if is_deleted is not None and is_deleted(user):
            yield tenant, user


def everyone(users: Path) -> set[tuple[str, str]]:
    """Return tenant and user of everyone whom the store or the log of a folder has."""
    paths, found = UsersFolder(users), list[tuple[str, bytes]]()
    if is_made(paths.manifest):
        with closing(Manifest(paths.manifest, WAIT_SECONDS)) as manifest:
            found += manifest.owners_of_records()
    if is_made(paths.log):
        with closing(InteractionLog(users)) as log:
            found += log.owners()
    return {(tenant, user_of(key)) for tenant, key in found}


@contextmanager
def working(run: Path) -> Iterator[None]:
    """Hold the shared writer lock of a run folder while the block runs: no deletion can finish before the block ends.

    Unfinished deletions are resumed before and after the block; files that killed processes left are removed before.
    """
    if not os.access(run, os.W_OK):
        yield  # the write itself raises the error
        return
    home = RunFolder(run).home
    finish_deletions(home.users.path)
    delete_returned(home.users.path)
    sweep(home.path)
    _drop_finished(home.path)
    try:
        with locked(home.writers_lock, shared=True):
            yield
    finally:
        finish_deletions(home.users.path)


def links_out_of(folder: Path) -> list[Path]:
    """Return the symbolic links below a folder that point outside of it; links are not followed."""
    home = folder.resolve()
    return sorted(path for path in _links(folder) if not Path(os.path.realpath(path)).is_relative_to(home))


def _links(folder: Path) -> Iterator[Path]:
    """Yield the symbolic links below a folder; a folder that cannot be read has none."""
    left = [str(folder)]
    while left:
        with suppress(OSError), os.scandir(left.pop()) as entries:
            # The entries know their kind: a call for each of a million users' files would take a long time.
            for entry in entries:
                if entry.is_symlink():
                    yield Path(entry.path)
                elif entry.is_dir(follow_symlinks=False):
                    left.append(entry.path)


def _work(store: AdapterStore, log: InteractionLog, deletion: Deletion, patience: float) -> list[str]:
    """Run or resume a deletion; return what it has to wait for, one line each."""
    if deletion.user is not None:
        waits = _remove_all(store, log, deletion.user, patience)
        if waits:
            return waits
    if not log.deletions.end(deletion, patience):
        return [f"{log.database.path}: another process reads it"]
    return []


def _remove_all(store: AdapterStore, log: InteractionLog, user: str, patience: float) -> list[str]:
    run, waits = RunFolder(store.folder.parent).home.path, list[str]()
    try:
        with _being_deleted(log, store.tenant, user) as goes_on:
            if not goes_on:
                return []
            store.tombstones.add(store.tenant, user)
        if store.tenant == DEFAULT_TENANT:
            _require_no_training(run, user)
        with locked(RunFolder(run).writers_lock, patience=patience) as alone:
            if alone is None:
                waits.append(f"{run}: another command writes into it")
            elif store.tenant == DEFAULT_TENANT:  # two processes that rewrite one file would undo each other's change
                waits += _remove_files(run, user)
            for folder in nested_runs(run):
                users = RunFolder(folder).users
                if users.path != store.folder and is_made(users.manifest):
                    with _opened(users.path, store.tenant) as (nested, nested_log):
                        waits += _remove(nested, nested_log, user, patience, alone is not None, nullcontext(True))
            deleting = _being_deleted(log, store.tenant, user)
            waits += _remove(store, log, user, patience, alone is not None, deleting)
    except (ProperError, OSError) as error:
        waits.append(str(error))
    return waits


def _remove_files(run: Path, user: str) -> list[str]:
    waits = []
    close_to_others(run)
    sweep(run)
    for kind, path in files_of(run):
        try:
            kind.remove(path, user)
        except (OSError, ProperError) as error:
            waits.append(f"{path}: {getattr(error, 'strerror', None) or error}")
    return waits


@contextmanager
def _being_deleted(log: InteractionLog, tenant: str, user: str) -> Iterator[bool]:
    """Yield whether a user's deletion has not ended, which cannot change while the block runs.

    Two processes may run one deletion. When the first has ended it, the user can be enrolled again: the second, which
    knows the deletion from an earlier look, must not touch what came since.
    """
    with log.database.transaction():
        yield log.deletions.of(tenant, user) is not None


def _remove(
    store: AdapterStore,
    log: InteractionLog,
    user: str,
    patience: float,
    alone: bool,
    deleting: AbstractContextManager[bool],
) -> list[str]:
    with deleting as goes_on:
        if not goes_on:
            return []
        with log.deleting(store.tenant, user) as logged:
            store.delete(user)
    if logged.claim is not None:
        log.queue.wait_for(logged.claim)  # the worker that fits the user finds its claim void at the next step
    if alone:  # a command that enrols many users works in their folders
        remove_work(store.folder, store.tenant, user)
    remove_quarantine(store.folder)
    wiped = {store.manifest.path: store.wipe(patience, user), log.database.path: log.database.wipe(patience, user)}
    waits = [f"{path}: another process reads it" for path, done in wiped.items() if not done]
    if not store.shards.remove_unowned(patience):
        waits.append(f"{store.shards.name}: another process writes it")
    return waits


@contextmanager
def _opened(folder: Path, tenant: str) -> Iterator[tuple[AdapterStore, InteractionLog]]:
    """Open a store and its log while the block runs."""
    with closing(AdapterStore(folder, tenant)) as store, closing(InteractionLog(folder)) as log:
        yield store, log


def _drop_finished(run: Path) -> None:
    """Remove what trained stages keep for resuming: a kill may have come between a stage's marker and its removal."""
    for folder in map(RunFolder, nested_runs(run)):
        # A refresh of the groups uses the same names.
        for name in () if folder.users.refresh.exists() else UNFINISHED:
            path = folder.path / name
            if not folder.is_trained(PurePath(name).parts[0]):
                continue
            if path.is_dir():
                shutil.rmtree(path, ignore_errors=True)
            else:
                path.unlink(missing_ok=True)


def _require_no_training(run: Path, user: str) -> None:
    """Require that no stage is being trained on data of the user."""
    _drop_finished(run)
    busy = next((folder / name for folder in nested_runs(run) for name in UNFINISHED if (folder / name).exists()), None)
    refresh = RunFolder(run).users.refresh.exists()  # it trains on logged interactions, too
    if busy is not None and (refresh or any(True for _ in run_rows(run, user))):
        raise TrainingError(
            f"{busy}: a stage is being trained and holds user {user!r}; let the run end, then delete them"
        )


@contextmanager
def _prepared(path: Path) -> Iterator[sqlite3.Connection]:
    """Open prepared data to read; SQLite's errors inside the block become StoreError, which names the file."""
    try:
        with closing(open_to_read(path)) as data:
            yield data
    except sqlite3.Error as error:
        raise StoreError(f"{path}: cannot be read: {error}") from error


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
            texts = {"prompt": prompt, "target": target, "timestamp": time, "item": item}
            yield {"source": "run", "row": row, "part": part, **texts}


def logged_rows(log: InteractionLog, tenant: str, user: str) -> Iterator[dict[str, Any]]:
    """Yield every logged interaction of a user, in the order of arrival."""
    for each in log.interactions(tenant, user):
        own = {"id": each.id, "prompt": each.prompt, "target": each.target, "timestamp": each.time}
        yield {"source": "log", **own, "received": each.received}
