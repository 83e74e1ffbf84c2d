"""URLs of the option `--store`: a bucket for the adapters of a run, or a PostgreSQL database for its state."""

from __future__ import annotations

from collections.abc import Container
from pathlib import Path

from proper.adapters.storage_setting import EXAMPLE, forget, parse_url, record
from proper.databases.location import POSTGRESQL, checked, location_of
from proper.databases.setup import drop_state, keep_state
from proper.errors import InputError
from proper.run_folder import RunFolder


def check_store(url: str) -> None:
    """Check a URL without using it.

    Raises:
        InputError: it is neither kind of URL, or has a password.
    """
    if _is_postgresql(url):
        checked(url)
    else:
        parse_url(url, "")


def record_store(run: Path, url: str) -> None:
    """Record in a new run folder where the run keeps its adapters (s3://...) or its state (postgresql://...).

    Raises:
        InputError: the run keeps them elsewhere, or the URL cannot be used.
        StoreError: the bucket or the database cannot be used.
    """
    if _is_postgresql(url):
        keep_state(run, url)
    else:
        record(run, url)


def forget_stores(run: Path, kept: Container[Path]) -> None:
    """Undo `record_store` in a run folder without adapters and state, except for the settings among the paths `kept`.

    Raises:
        StoreError: the bucket or the database cannot be used.
    """
    folder, place = RunFolder(run), location_of(RunFolder(run).users.path)
    if folder.storage not in kept:
        forget(run)
    if place is not None and folder.database not in kept:
        drop_state(place)
        folder.database.unlink()


def _is_postgresql(url: str) -> bool:
    """Return whether a URL is a database's rather than a bucket's; raise InputError if it is neither."""
    scheme, found, _ = url.partition("://")
    if not found or (scheme != "s3" and not scheme.startswith("postgres")):
        text = f"{scheme}://..." if found else url  # what follows may have a password
        raise InputError(
            f"--store {text}: neither {EXAMPLE} (for adapters) nor {POSTGRESQL} (for state); leave --store out to keep "
            "both in the run folder"
        )
    return scheme != "s3"
