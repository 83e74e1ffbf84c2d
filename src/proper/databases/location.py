"""Where the state of a run is: in SQLite files of its folder, or in the PostgreSQL database that `database.json` names.

State is the manifest of the adapter store, the interaction log with the fit queue, the tombstones and the API keys.
Every command and the server follow `database.json`, which `proper run --store` writes. It has no password: libpq takes
one from PGPASSWORD, or from the file that PGPASSFILE names. Seeds and variants of a run, which only evaluation reads,
and temporary stores have no such file: they are SQLite.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from sqlalchemy.engine import make_url
from sqlalchemy.exc import ArgumentError

from proper.errors import InputError, RunFolderError
from proper.json_records import read_record
from proper.run_folder import RunFolder

POSTGRESQL = "postgresql://USER@HOST/DATABASE"
"""The form of a database's URL, for messages."""


@dataclass(frozen=True)
class Location:
    """A schema of a PostgreSQL database.

    Attributes:
        url: `postgresql://USER@HOST:PORT/DATABASE`, without a password.
        schema: the schema that holds the state of one run.
    """

    url: str
    schema: str

    def __str__(self) -> str:
        return f"{self.url} (schema {self.schema})"


def location_of(users: Path) -> Location | None:
    """Return where the state of a store's folder is; None for SQLite files in it.

    Raises:
        RunFolderError: the run's `database.json` cannot be read.
    """
    path = RunFolder(users.absolute().parent).database
    if users.name != RunFolder(Path()).users.path.name or not path.is_file():
        return None
    found = read_record(path, "it names the place of the run's state, restore a backup", url=str, schema=str)
    try:
        return Location(checked(found["url"]), found["schema"])
    except InputError as error:
        raise RunFolderError(
            f"{path}: does not name the place of the run's state: {error}; restore a backup"
        ) from error


def is_made(database: Path) -> bool:
    """Return whether there is a database: the SQLite file at this path, or the PostgreSQL schema in its place."""
    return database.is_file() or location_of(database.parent) is not None


def checked(url: str, accepted: str = POSTGRESQL) -> str:
    """Return the URL of a PostgreSQL database as it is; `accepted` is what the option `--store` accepts, for the error.

    Raises:
        InputError: it is no PostgreSQL URL, names no database, or has a password, which the message does not repeat.
    """
    try:
        parts = make_url(url)
    except (ArgumentError, ValueError) as error:  # ValueError: a port that is no number
        raise InputError(f"--store: not a URL; write {accepted}") from error
    if parts.password is not None or "password" in parts.query:
        raise InputError("--store: has a password; leave it out, and set PGPASSWORD or PGPASSFILE instead")
    if parts.drivername != "postgresql" or not parts.database:
        raise InputError(f"--store {url}: not the URL of a PostgreSQL database; write {accepted}")
    return url
