"""URLs of the option `--store`: a bucket for the adapters of a run, or a PostgreSQL database for its state."""

from __future__ import annotations

from pathlib import Path

from proper.adapters.storage_setting import parse_url, record
from proper.databases.location import checked
from proper.databases.setup import keep_state


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


def _is_postgresql(url: str) -> bool:
    return url.startswith("postgres")
