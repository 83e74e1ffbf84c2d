"""How a user is taken out of each personal file of a run folder.

`run_files` is the registry: it lists every file that can lie in a run folder, and nothing else can be written there.
Each pattern of its `PERSONAL` has a remover here, or this module cannot be imported. A test runs all commands on a run,
looks for every user's id and texts in every byte of the folder, asks the registry about each hit, and finds none after
the user is deleted. What many users share (population, groups, the LoRA-aware router, aggregate results, adapters of a
control that trains on texts handed to other users) is residue: no user can be taken out of it but by training again.
The file that the run read (`data.path`) belongs to the run's owner and is not touched.

    users/users.sqlite, users/blobs/    the store                         `AdapterStore.delete`, `AdapterStore.wipe`
    users/quarantine/                   what a repair put aside           `remove_quarantine`
    users/interactions.sqlite           the log                           `InteractionLog.deleting`, `Database.wipe`
    all others                          `PERSONAL_FILES`, patterns below a run folder, seeds and variants included
    .NAME.*.tmp                         half-written files                `files.sweep`, where their writer is dead
"""

from __future__ import annotations

import json
import shutil
import sqlite3
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import dataclass
from hashlib import blake2b
from pathlib import Path
from typing import Any

from proper.adapters.manifest import key_of
from proper.adapters.quarantine import QUARANTINE
from proper.adapters.store import DEFAULT_TENANT
from proper.adapters.tombstones import Tombstones
from proper.errors import StoreError
from proper.files import atomic_path, read_json, write_json
from proper.run_files import PERSONAL


@dataclass(frozen=True)
class PersonalFile:
    """A kind of file.

    Attributes:
        pattern: below a run folder.
        holds: what of a person.
        remove: takes a person out of the file.
    """

    pattern: str
    holds: str
    remove: Callable[[Path, str], None]


def fits_folder(users: Path) -> Path:
    """Return where fits of a store's users leave what they need to go on after a kill."""
    return users / "fits"


def work_folder(users: Path, tenant: str, user: str) -> Path:
    """Return where one user's fit does so; the name gives nobody away."""
    key = json.dumps([tenant, key_of(user).hex()])
    return fits_folder(users) / blake2b(key.encode(), digest_size=16).hexdigest()


def folders(run: Path) -> Iterator[Path]:
    """Yield the run folder and the folders below it that are run folders themselves: further seeds, other methods."""
    yield run
    for config in sorted(run.rglob("config.yaml")):
        if config.parent != run:
            yield config.parent


def files_of(run: Path) -> Iterator[tuple[PersonalFile, Path]]:
    """Yield every file beside stores and logs that can hold something of a person, with what it is."""
    for folder in folders(run):
        for place in PERSONAL_FILES:
            for path in sorted(folder.glob(place.pattern)):
                if path.is_file():
                    yield place, path


def remove_deleted(run: Path, data: Path) -> None:
    """Take the users who were deleted from a run out of the demo's files in `data`, which were written anew."""
    deleted = Tombstones(run / "users").of_tenant(DEFAULT_TENANT)
    if deleted is None:
        return
    rows = (json.loads(line) for line in (data / "interactions.jsonl").read_text(encoding="utf-8").splitlines())
    for user in {user for row in rows if deleted(user := row["user_id"])}:
        _from_lines(data / "interactions.jsonl", user)
        _from_truth(data / "truth.json", user)


def _from_lines(path: Path, user: str) -> None:
    """Take a person's lines out of a JSONL file."""

    def theirs(line: bytes) -> bool:
        try:
            row = json.loads(line)
        except ValueError:
            return False
        return isinstance(row, dict) and user in (row.get("user"), row.get("user_id"))

    if not _mentions(path, user):
        return
    with atomic_path(path) as temporary, path.open("rb") as lines, temporary.open("wb") as kept:
        kept.writelines(line for line in lines if not theirs(line))


def _from_json(path: Path, user: str) -> None:
    """Take the entries about a person out of the lists of a JSON file."""
    if _mentions(path, user):
        write_json(path, _without(read_json(path), user))


def _without(value: Any, user: str) -> Any:
    if isinstance(value, dict):
        return {key: _without(each, user) for key, each in value.items()}
    if isinstance(value, list):
        return [_without(each, user) for each in value if not _is_about(each, user)]
    return value


def _from_truth(path: Path, user: str) -> None:
    """Take a person of the demo, and their items, out of its mappings."""
    if not _mentions(path, user):
        return
    truth = read_json(path)
    for name, value in truth.items():
        if isinstance(value, dict):
            truth[name] = {k: each for k, each in value.items() if k != user and not k.startswith(f"{user}-")}
    write_json(path, truth)


def _is_about(value: Any, user: str) -> bool:
    return isinstance(value, dict) and user in (value.get("user"), value.get("user_id"))


def _whole(path: Path, user: str) -> None:
    """Remove a file that can be made again."""
    if _mentions(path, user):
        path.unlink(missing_ok=True)


def _derived(path: Path, user: str) -> None:
    """Remove data derived from the run's, which can be made again; texts may have been handed to other users in it."""
    try:
        with closing(sqlite3.connect(f"{path.absolute().as_uri()}?mode=ro", uri=True)) as data:
            held = data.execute("SELECT 1 FROM users WHERE id = ?", (user,)).fetchone() is not None
    except sqlite3.Error:
        held = True  # half-written: it has to be made again in any case
    if held:
        path.unlink(missing_ok=True)


def _mentions(path: Path, user: str) -> bool:
    """Whether a text file may name a user, in any way in which JSON or HTML write the name."""
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


def _from_data(path: Path, user: str) -> None:
    """Take a person's rows and texts out of the prepared data."""
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
    """Drop the messages about bad rows, which quote values and do not say whose; their count stays."""
    found = data.execute("SELECT value FROM meta WHERE key = 'bad_rows'").fetchone()
    if found is not None:
        value = json.dumps({**json.loads(found[0]), "first": []})
        data.execute("UPDATE meta SET value = ? WHERE key = 'bad_rows'", (value,))


def _answers(path: Path, user: str) -> None:
    """Remove a file of answers that names nobody, where the answers beside it are somebody's."""
    if any(_mentions(beside, user) for beside in path.parent.glob("*.jsonl")):
        path.unlink(missing_ok=True)


def remove_quarantine(users: Path) -> None:
    """Remove all that a repair put aside: whose it is nobody can tell, so it may be of whoever is deleted."""
    folder = users / QUARANTINE
    if folder.exists():
        shutil.rmtree(folder)


def remove_work(users: Path, tenant: str, user: str) -> None:
    """Remove what a fit of a user left to go on from."""
    shutil.rmtree(work_folder(users, tenant, user), ignore_errors=True)


_REMOVERS: dict[str, tuple[str, Callable[[Path, str], None]]] = {
    "predictions/*.lamp.json": ("answers in the benchmark's format, without names", _answers),
    "predictions/*.jsonl": ("their queries and the answers", _from_lines),
    "users.json": ("their scores", _from_json),
    "routing.json": ("their gates and where their embedding lies", _from_json),
    "analysis.json": ("losses on their history, kept so as not to be measured again", _whole),
    "report.html": ("examples and scores; 'proper report' writes it again", _whole),
    "report-user-*.html": ("a page of the user, or of another whose neighbour the user is", _whole),
    "compare-*.html": ("the page of two runs", _whole),
    "compare-*.csv": ("its numbers", _whole),
    "data.sqlite": ("their rows and texts", _from_data),
    "variants/data/*.sqlite": ("their rows and texts, made for a method", _derived),
    "variants/data/*.sqlite.between": ("the same, on the way", _derived),
    "data/*.jsonl": ("the demo's rows", _from_lines),
    "data/*.json": ("the demo's truth about them", _from_truth),
}

PERSONAL_FILES = tuple(PersonalFile(pattern, *_REMOVERS[pattern]) for pattern in PERSONAL)
