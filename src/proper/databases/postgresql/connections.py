"""Connections to the PostgreSQL schema of a run: one pool per process, and the locks that connections hold.

Each connection of a pool holds the schema's advisory lock, shared, for as long as it is open. A process that moves the
state takes that lock alone, so it knows that no other process has a connection, and none can make one meanwhile.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator
from contextlib import closing, contextmanager
from hashlib import blake2b
from typing import Any

import psycopg
from sqlalchemy import Engine as Pool
from sqlalchemy import create_engine, event
from sqlalchemy.engine import make_url
from sqlalchemy.exc import DBAPIError, SQLAlchemyError

from proper.databases.location import Location
from proper.databases.postgresql.migrations import migrate
from proper.errors import RunFolderError, StoreError, UnavailableError, UnstorableError

# The server notices within a minute that a client's machine is gone, and rolls its transaction back.
_SETTINGS = "-c tcp_keepalives_idle=30 -c tcp_keepalives_interval=10 -c tcp_keepalives_count=3"
# A client notices as soon that the server's machine is gone. By the system's own limits, a read would wait for hours.
_KEEPALIVES = {"keepalives_idle": 30, "keepalives_interval": 10, "keepalives_count": 3, "tcp_user_timeout": 60_000}


class Pools:
    """The connection pools of this process, each shared by all databases of one location and closed by the last."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._open: dict[tuple[int, Location], tuple[Pool, int]] = {}
        self.alone: Location | None = None
        """The schema that this process uses alone: its connections need no further lock."""

    def take(self, location: Location) -> Pool:
        """Return the pool of a location; the first use checks that the schema is there, and migrates it."""
        key = os.getpid(), location  # a connection does not survive a fork
        with self._lock:
            pool, users = self._open.get(key) or (_migrated(location), 0)
            self._open[key] = pool, users + 1
            return pool

    def release(self, location: Location) -> None:
        """Give a pool back."""
        key = os.getpid(), location
        with self._lock:
            pool, users = self._open.pop(key)
            if users > 1:
                self._open[key] = pool, users - 1
            else:
                pool.dispose()


POOLS = Pools()


@contextmanager
def alone(location: Location) -> Iterator[None]:
    """Keep other processes from connecting to a schema while the block runs.

    Raises:
        RunFolderError: one is connected.
        StoreError: the server cannot be reached.
    """
    pool = _pool(location)
    try:
        with translated(location, ""):
            connection = pool.raw_connection()
        with closing(connection):
            if not _has_locked(connection.driver_connection, location, "pg_try_advisory_lock"):
                raise RunFolderError(
                    f"{location}: another process uses it; stop the run's server, workers and commands"
                )
            POOLS.alone = location
            yield
    finally:
        POOLS.alone = None
        pool.dispose()


def open_pool(location: Location) -> Pool:
    """Return connections to a schema, which does not have to exist.

    Opening one raises RunFolderError while another process moves the state.
    """
    pool = _pool(location)

    @event.listens_for(pool, "connect")
    def hold(connection: Any, _: object) -> None:
        if POOLS.alone != location and not _has_locked(connection, location, "pg_try_advisory_lock_shared"):
            raise RunFolderError(f"{location}: another process moves this state; wait until it has ended")

    return pool


def _pool(location: Location) -> Pool:
    return create_engine(
        make_url(location.url).set(drivername="postgresql+psycopg"),
        isolation_level="AUTOCOMMIT",
        max_overflow=-1,  # a thread that waits for a second connection while it holds one must get it
        pool_reset_on_return=None,
        connect_args={
            "options": f"{_SETTINGS} -c search_path={location.schema}",
            "application_name": "proper",
            "connect_timeout": 10,
            **_KEEPALIVES,
        },
    )


def _has_locked(connection: Any, location: Location, function: str) -> bool:
    """Try to take a lock that the connection keeps until it is closed, whatever its transactions do."""
    return bool(connection.execute(f"SELECT {function}({lock_key('process', location.schema)})").fetchone()[0])


def _migrated(location: Location) -> Pool:
    pool = open_pool(location)
    try:
        migrate(pool, location)
    except BaseException:
        pool.dispose()
        raise
    return pool


@contextmanager
def translated(location: Location, what: str) -> Iterator[None]:
    """Turn errors of the driver into one line that names the database."""
    try:
        yield
    # The character NUL, which PostgreSQL's text cannot hold; ids of user and interaction too long for one index entry.
    except (psycopg.DataError, psycopg.errors.ProgramLimitExceeded) as error:
        raise UnstorableError(f"{location}: {what}{_one_line(error)}") from error
    except (psycopg.Error, SQLAlchemyError) as error:
        cause = error.orig if isinstance(error, DBAPIError) and error.orig is not None else error
        kind = UnavailableError if isinstance(cause, psycopg.OperationalError) else StoreError
        raise kind(f"{location}: {what}{_one_line(cause)}") from error


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split()) or type(error).__name__


def lock_key(*names: str) -> int:
    """Return the key of the advisory lock with a name."""
    content = "\0".join(names).encode("utf-8", "surrogatepass")
    return int.from_bytes(blake2b(content, digest_size=8).digest(), "big", signed=True)
