"""Choice of the place where a new run keeps its state."""

from __future__ import annotations

import secrets
from dataclasses import asdict
from pathlib import Path

from proper.databases.location import Location, checked, location_of
from proper.errors import InputError
from proper.extras import needs_extra
from proper.files import write_json
from proper.run_folder import RunFolder


def keep_state(run: Path, url: str) -> None:
    """Make a schema for a run in a PostgreSQL database and record it in the run's `database.json`.

    Called before the run has any state; another call with the same URL changes nothing.

    Raises:
        InputError: the URL is no PostgreSQL URL or has a password, or the run keeps its state elsewhere.
        StoreError: the database cannot be reached, or the schema cannot be made.
    """
    folder, url = RunFolder(run), checked(url)
    found = location_of(folder.users.path)
    if found is not None:
        if found.url != url:
            raise InputError(f"{folder.database}: the state of this run is in {found.url}, not in {url}")
        return
    held = (folder.users.manifest, folder.users.log, folder.keys, folder.tombstones)
    if there := next((path for path in held if path.exists()), None):
        raise InputError(
            f"{there}: the state of this run is in its folder already; move it: proper move-state {run} --store {url}"
        )
    with needs_extra("postgresql", "'--store postgresql://...'"):
        from proper.databases.postgresql.database import make_schema
    new = Location(url, f"proper_{secrets.token_hex(8)}")
    make_schema(new)
    write_json(folder.database, asdict(new))


def drop_state(place: Location) -> None:
    """Remove a schema with everything in it, if it is there.

    Raises:
        StoreError: the database cannot be reached, or the schema is used.
    """
    with needs_extra("postgresql", f"the schema in {place}"):
        from proper.databases.postgresql.database import drop_schema
    drop_schema(place)
