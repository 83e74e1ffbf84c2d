"""Personal files of a run folder, and how a user's data is removed from each of them and extracted for an archive.

`run_folder` is the registry: it lists every file that can be in a run folder, and no other file can be written there.
Each pattern of its `Personal` must have a remover and an extractor here; otherwise importing this module fails. A test
runs all commands on a run, searches every byte of the folder for every user's id and texts, checks each hit against the
registry, and finds none after the user is deleted. Artifacts shared by many users (population, groups, the LoRA-aware
router, aggregate results, adapters of a control trained on texts assigned to other users) are residue: only retraining
removes a user from them. The input file of the run (`data.path`) belongs to the run's owner and is not touched.

    users/users.sqlite, users/blobs/    the store                         `AdapterStore.delete`, `AdapterStore.wipe`
    users/quarantine/                   data removed by a repair          `remove_quarantine`
    users/interactions.sqlite           the log                           `InteractionLog.deleting`, `Database.wipe`
    all others                          `PERSONAL_FILES`, patterns below a run folder, seeds and variants included
    .NAME.*.tmp                         half-written files                `files.sweep`, if their writer is dead

Hidden states of texts that training keeps on disk (`models.lower_layers`) are in a file without a name, which is gone
when the process ends; a deletion waits for that process.
"""

from __future__ import annotations

import json
import logging
import shutil
import sqlite3
from collections.abc import Callable, Iterable, Iterator
from contextlib import closing
from dataclasses import dataclass
from hashlib import blake2b
from pathlib import Path
from typing import Any

from proper.adapters.manifest import key_of
from proper.adapters.store import DEFAULT_TENANT
from proper.adapters.tombstones import Tombstones
from proper.errors import RunFolderError, StoreError
from proper.files import atomic_path, write_json
from proper.interactions import personal_extracts as extracts
from proper.json_records import read_record
from proper.run_folder import Personal, RunFolder, UsersFolder, nested_runs
from proper.sqlite_files import open_to_read

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class PersonalFile:
    """One kind of personal file.

    Attributes:
        pattern: path pattern relative to a run folder.
        holds: which data of a user the file has.
        remove: removes a user's data from the file.
        extract: returns the user's data in the file as JSON values, for an archive.
    """

    pattern: str
    holds: str
    remove: Callable[[Path, str], None]
    extract: Callable[[Path, str], list[Any]]


def work_folder(users: Path, tenant: str, user: str) -> Path:
    """Return the folder for one user's fit in `UsersFolder.fits`; its name does not reveal the user id."""
    key = json.dumps([tenant, key_of(user).hex()])
    return UsersFolder(users).fits / blake2b(key.encode(), digest_size=16).hexdigest()


def files_of(run: Path) -> Iterator[tuple[PersonalFile, Path]]:
    """Yield every file, other than stores and logs, that can have a user's data, with its kind."""
    for folder in nested_runs(run):
        for kind in PERSONAL_FILES:
            for path in sorted(folder.glob(kind.pattern)):
                if path.is_file():
                    yield kind, path


def remove_deleted(run: RunFolder) -> None:
    """Remove the run's deleted users from the demo's files, which were regenerated."""
    deleted = Tombstones(run.users.path).of_tenant(DEFAULT_TENANT)
    if deleted is None:
        return
    rows = (json.loads(line) for line in run.demo_rows.read_text(encoding="utf-8").splitlines())
    for user in {user for row in rows if deleted(user := row["user_id"])}:
        _from_lines(run.demo_rows, user)
        _from_truth(run.demo_truth, user)


def _from_lines(path: Path, user: str) -> None:
    """Remove a user's lines from a JSONL file, and the lines that cannot be read: they may be the user's."""
    if not _mentions(path, user):
        return
    unreadable = 0
    with atomic_path(path) as temporary, path.open("rb") as lines, temporary.open("wb") as kept:
        for line in lines:
            try:
                row = json.loads(line) if line.strip() else None
            except (ValueError, RecursionError):
                unreadable += 1
                continue
            if not _is_about(row, user):
                kept.write(line)
    if unreadable:
        logger.warning(f"{path}: removed {unreadable} damaged lines, which may be about a deleted user")


def _from_json(path: Path, user: str) -> None:
    """Remove the entries about a user from the lists of a JSON file; a damaged file goes as a whole."""
    if _mentions(path, user) and (found := _readable(path)) is not None:
        write_json(path, _without(found, user))


def _readable(path: Path) -> dict[str, Any] | None:
    """Return the object of a JSON file that can be made again; a damaged one is removed.

    A damaged file may hold the deleted user's data, and the deletion cannot wait until it is repaired.
    """
    try:
        return read_record(path, "such a file can be written again")
    except RunFolderError as error:
        logger.warning(f"{error}: removed the file, which may be about a deleted user")
        path.unlink(missing_ok=True)
        return None


def _without(value: Any, user: str) -> Any:
    if isinstance(value, dict):
        return {key: _without(each, user) for key, each in value.items()}
    if isinstance(value, list):
        return [_without(each, user) for each in value if not _is_about(each, user)]
    return value


def _from_truth(path: Path, user: str) -> None:
    """Remove a user of the demo, and the user's items, from the mappings of its ground-truth file."""
    if not _mentions(path, user) or (truth := _readable(path)) is None:
        return
    for name, value in truth.items():
        if isinstance(value, dict):
            truth[name] = {k: each for k, each in value.items() if k != user and not k.startswith(f"{user}-")}
    write_json(path, truth)


def _is_about(value: Any, user: str) -> bool:
    return isinstance(value, dict) and user in (value.get("user"), value.get("user_id"))


def _whole(path: Path, user: str) -> None:
    """Remove a whole file that can be regenerated."""
    if _mentions(path, user):
        path.unlink(missing_ok=True)


def _derived(path: Path, user: str) -> None:
    """Remove derived data, which can be regenerated; it may assign the user's texts to other users."""
    try:
        with closing(open_to_read(path)) as data:
            found = data.execute("SELECT 1 FROM users WHERE id = ?", (user,)).fetchone() is not None
    except sqlite3.Error:
        found = True  # half-written: it has to be regenerated in any case
    if found:
        path.unlink(missing_ok=True)


def _mentions(path: Path, user: str) -> bool:
    """Return whether a text file may name a user, in any JSON or HTML escaping of the id."""
    plain = all(letter.isalnum() or letter in " .-_" for letter in user) and user.isascii()
    if not plain:
        return True
    wanted, tail = user.encode(), b""
    with path.open("rb") as file:
        while piece := file.read(1 << 20):
            if wanted in tail + piece:
                return True
            tail = piece[-len(wanted) :]
    return False


def remove_rows(path: Path, users: Iterable[str]) -> None:
    """Remove the rows and texts of users from prepared data, of those that it has.

    Raises:
        StoreError: the data cannot be read or written.
    """
    for user in users:
        _from_data(path, user)


def _from_data(path: Path, user: str) -> None:
    """Remove a user's rows and texts from the prepared data."""
    try:
        with closing(sqlite3.connect(path, isolation_level=None, timeout=60)) as data:
            data.execute("PRAGMA secure_delete=ON")
            data.execute("BEGIN IMMEDIATE")
            found = data.execute("SELECT number FROM users WHERE id = ?", (user,)).fetchone()
            if found is not None:
                _forget_bad_rows(data)
                data.execute("DELETE FROM texts WHERE id IN (SELECT text FROM rows WHERE user = ?)", found)
                data.execute("DELETE FROM rows WHERE user = ?", found)
                data.execute("DELETE FROM users WHERE number = ?", found)
            data.execute("COMMIT")
    except sqlite3.Error as error:
        raise StoreError(f"{path}: cannot be written: {error}") from error


def _forget_bad_rows(data: sqlite3.Connection) -> None:
    """Drop the messages about bad rows, which quote values without naming the user; their count stays."""
    found = data.execute("SELECT value FROM meta WHERE key = 'bad_rows'").fetchone()
    if found is not None:
        try:
            count = int(json.loads(found[0])["count"])
        except (ValueError, TypeError, KeyError, RecursionError):
            count = 0  # damaged: what it quotes goes with it
        value = json.dumps({"count": count, "first": []})
        data.execute("UPDATE meta SET value = ? WHERE key = 'bad_rows'", (value,))


def _answers(path: Path, user: str) -> None:
    """Remove an answers file, which names no users, if a JSONL file beside it names this user."""
    if any(_mentions(beside, user) for beside in path.parent.glob("*.jsonl")):
        path.unlink(missing_ok=True)


def remove_quarantine(users: Path) -> None:
    """Remove the whole quarantine folder: its data cannot be attributed, so it may belong to the deleted user."""
    folder = UsersFolder(users).quarantine
    if folder.exists():
        shutil.rmtree(folder)


def remove_work(users: Path, tenant: str, user: str) -> None:
    """Remove the state that a user's fit keeps for resuming.

    The folder is renamed first: after a kill, no later fit resumes from what is left of it.
    """
    folder = work_folder(users, tenant, user)
    gone = folder.with_name(f".{folder.name}.tmp")
    shutil.rmtree(gone, ignore_errors=True)
    if folder.is_dir():
        folder.rename(gone)
        shutil.rmtree(gone, ignore_errors=True)


_KINDS: dict[Personal, tuple[str, Callable[[Path, str], None], Callable[[Path, str], list[Any]]]] = {
    Personal.LAMP_ANSWERS: ("answers in the benchmark's format, without names", _answers, extracts.from_answers),
    Personal.PREDICTIONS: ("their queries and the answers", _from_lines, extracts.from_lines),
    Personal.USER_SCORES: ("their scores", _from_json, extracts.from_json),
    Personal.ROUTING: ("their gates and where their embedding lies", _from_json, extracts.from_json),
    Personal.ANALYSIS: ("losses on their history, kept so as not to be measured again", _whole, extracts.from_json),
    Personal.REPORT: ("examples and scores; 'proper report' writes it again", _whole, extracts.from_page),
    Personal.USER_REPORTS: (
        "a page of the user, or of another whose neighbour the user is",
        _whole,
        extracts.from_page,
    ),
    Personal.COMPARISON_PAGES: ("the page of two runs", _whole, extracts.from_page),
    Personal.COMPARISON_TABLES: ("its numbers", _whole, extracts.from_table),
    Personal.DATA: ("their rows and texts", _from_data, extracts.from_data),
    Personal.VARIANT_DATA: ("their rows and texts, made for a method", _derived, extracts.from_data),
    Personal.VARIANT_DATA_UNFINISHED: ("the same, on the way", _derived, extracts.from_data),
    Personal.DEMO_ROWS: ("the demo's rows", _from_lines, extracts.from_lines),
    Personal.DEMO_TRUTH: ("the demo's truth about them", _from_truth, extracts.from_truth),
}

PERSONAL_FILES = tuple(PersonalFile(str(pattern), *_KINDS[pattern]) for pattern in Personal)
