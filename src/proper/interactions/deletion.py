"""Deletion of a user from every personal file of a run; see `personal_files`.

A deletion first writes a row in the log's database (`deletions`) and a tombstone, then removes the data, and ends when
no byte is left. After a kill at any point the row remains; while another process reads or writes, the rest is
postponed. `finish_deletions` resumes it: at the start and end of every command that writes into the run, in a server,
and in `proper users check`. `delete_returned` deletes users again whom a backup brought back.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import closing, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path, PurePath

from proper.adapters.store import DEFAULT_TENANT, AdapterStore
from proper.databases.location import is_made
from proper.errors import InputError, ProperError, StoreError
from proper.files import close_to_others, locked, sweep
from proper.interactions.deletion_jobs import Deletion
from proper.interactions.log import InteractionLog
from proper.interactions.personal_files import files_of, remove_quarantine, remove_work
from proper.interactions.user_rows import run_rows, users_of_data, users_of_stores
from proper.run_folder import UNFINISHED, RunFolder, UsersFolder, nested_runs
from proper.sqlite_files import read_only_error

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
    return Removal(found, deletion.job, tuple(_resume(store, log, deletion, patience)))


def finish_deletions(users: Path, patience: float = 0.0) -> list[str]:
    """Resume all unfinished deletions of a store's folder; return why some remain unfinished, one line each."""
    if not is_made(UsersFolder(users).log) or not os.access(users, os.W_OK):
        return []
    waits = []
    with closing(InteractionLog(users)) as log:
        for deletion in log.deletions.pending():
            with closing(AdapterStore(users, deletion.tenant)) as store:
                waits += _resume(store, log, deletion, patience)
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
    """Yield tenant and user of all users with a tombstone in a store, a log or data, of seeds and variants too."""
    found = set[tuple[str, str]]()
    for folder in nested_runs(RunFolder(store.folder.parent).home.path):
        run = RunFolder(folder)
        found |= users_of_stores(run.users.path)
        if run.data.is_file():
            found |= {(DEFAULT_TENANT, user) for user in users_of_data(run.data)}
    deleted = {tenant: store.tombstones.of_tenant(tenant) for tenant, _ in found}
    for tenant, user in found:
        is_deleted = deleted[tenant]
        if is_deleted is not None and is_deleted(user):
            yield tenant, user


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


def _resume(store: AdapterStore, log: InteractionLog, deletion: Deletion, patience: float) -> list[str]:
    """Run or resume a deletion; return what it has to wait for, one line each."""
    if deletion.user is not None:
        waits = _remove_all(store, log, deletion.user, patience)
        if waits:
            return waits
    if not log.deletions.end(deletion, patience):
        return [f"{log.database.path}: another process reads it"]
    return []


def _remove_all(store: AdapterStore, log: InteractionLog, user: str, patience: float) -> list[str]:
    """Remove a user from the files, the nested runs and, last, the store and the log; return what it waits for.

    Two processes may run one deletion. When the first has ended it, the user can be enrolled again: the second, which
    knows the deletion from an earlier look, must not touch what came since. So each transaction looks again.
    """
    run, waits = RunFolder(store.folder.parent).home.path, list[str]()
    try:
        with log.database.transaction():
            if log.deletions.of(store.tenant, user) is None:
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
                        _delete(nested, nested_log, user)
                        waits += _wipe(nested, nested_log, user, patience, alone is not None)
            with log.database.transaction():
                if log.deletions.of(store.tenant, user) is None:
                    return waits
                _delete(store, log, user)
            waits += _wipe(store, log, user, patience, alone is not None)
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


def _delete(store: AdapterStore, log: InteractionLog, user: str) -> None:
    """Delete a user's records and log."""
    with log.deleting(store.tenant, user):
        store.delete(user)


def _wipe(store: AdapterStore, log: InteractionLog, user: str, patience: float, alone: bool) -> list[str]:
    """Remove what is left of a user whose records and log are deleted; return what it has to wait for."""
    noticed = log.queue.noticed(patience)  # the worker that fits the user finds its claim void at the next step
    if alone:  # a command that enrols many users works in their folders
        remove_work(store.folder, store.tenant, user)
    remove_quarantine(store.folder)
    wiped = {store.manifest.path: store.wipe(patience, user), log.database.path: log.database.wipe(patience, user)}
    waits = [f"{path}: another process reads it" for path, done in wiped.items() if not done]
    if not noticed:
        waits.append(f"{store.folder}: a fit of a deleted user has not ended yet")
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
