"""Fit queue: one persistent row per user with the state of the user's latest fit, readable by any process.

    idle -> queued -> fitting -> done | failed        new interactions queue again, also while a fit runs

The fitting worker takes a claim; deleting a user (also if the user is enrolled anew) voids the claim. One process fits
at a time (an flock beside the file), so a fit in state "fitting" when a process acquires the lock was left behind by a
process that died, and is queued again.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from proper.adapters.manifest import key_of, user_of
from proper.files import locked
from proper.interactions.database import Database
from proper.run_folder import UsersFolder
from proper.sqlite_files import read_only_error

State = Literal["idle", "queued", "fitting", "done", "failed"]
ATTEMPTS = 3
"""Number of processes that may die during one fit before it counts as failed."""


@dataclass(frozen=True, slots=True)
class Fit:
    """State and progress of a user's latest fit.

    Attributes:
        progress: from 0 to 1.
        phase: the current phase, in a word or two.
        message: the error or the result, in one line.
        version: the store version that the fit wrote.
    """

    state: State = "idle"
    progress: float = 0.0
    phase: str | None = None
    message: str | None = None
    version: int | None = None


@dataclass(frozen=True, slots=True)
class Claim:
    """The right to fit a user; it covers the first `wanted` fit requests."""

    tenant: str
    user: str
    number: int
    wanted: int


@dataclass(frozen=True, slots=True)
class QueueFigures:
    """Number of fits by state, and how many have ended so far."""

    queued: int
    fitting: int
    done: int
    failed: int


class FitQueue:
    """The queue of fits in a log's database."""

    def __init__(self, database: Database) -> None:
        self.database = database

    def add(self, tenant: str, user: str) -> None:
        """Queue a user; a queued user keeps the place in the queue, and a running fit is followed by another."""
        with self.database.transaction():
            place = self._next("place")
            self.database.write(
                """INSERT INTO fits (tenant, user, state, place, wanted, attempts, progress)
                VALUES (?1, ?2, 'queued', ?3, 1, 0, 0) ON CONFLICT (tenant, user) DO UPDATE SET
                    wanted = wanted + 1, attempts = 0,
                    place = CASE WHEN state = 'queued' THEN place ELSE ?3 END,
                    progress = CASE WHEN state = 'fitting' THEN progress ELSE 0 END,
                    phase = CASE WHEN state = 'fitting' THEN phase END,
                    message = CASE WHEN state = 'fitting' THEN message END,
                    state = CASE WHEN state = 'fitting' THEN state ELSE 'queued' END""",
                (tenant, key_of(user), place),
            )

    def fit(self, tenant: str, user: str) -> Fit:
        """Return the state of a user's latest fit."""
        query = "SELECT state, progress, phase, message, version FROM fits WHERE tenant = ? AND user = ?"
        rows = self.database.read(query, (tenant, key_of(user)))
        return Fit(*rows[0]) if rows else Fit()

    def figures(self) -> QueueFigures:
        """Return the number of fits by state."""
        states = dict(self.database.read("SELECT state, count(*) FROM fits GROUP BY state"))
        ended = dict(self.database.read("SELECT name, value FROM counters"))
        return QueueFigures(
            states.get("queued", 0), states.get("fitting", 0), ended.get("done", 0), ended.get("failed", 0)
        )

    def waiting(self) -> list[tuple[str, str]]:
        """Return tenant and user of every fit that is queued or running."""
        rows = self.database.read("SELECT tenant, user FROM fits WHERE state IN ('queued', 'fitting')")
        return [(tenant, user_of(key)) for tenant, key in rows]

    def take(self, tenant: str | None = None, user: str | None = None) -> Claim | None:
        """Claim the user who has waited longest, or the given one; None if no such fit is queued."""
        where, values = "state = 'queued'", list[object]()
        if tenant is not None and user is not None:
            where, values = f"{where} AND tenant = ? AND user = ?", [tenant, key_of(user)]
        with self.database.transaction():
            query = f"SELECT tenant, user, wanted FROM fits WHERE {where} ORDER BY place LIMIT 1"
            rows = self.database.read(query, values)
            if not rows:
                return None
            (owner, key, wanted), number = rows[0], self._next("claim")
            self.database.write(
                """UPDATE fits SET state = 'fitting', claim = ?, attempts = attempts + 1, progress = 0,
                phase = 'waiting', message = NULL WHERE tenant = ? AND user = ?""",
                (number, owner, key),
            )
        return Claim(owner, user_of(key), number, wanted)

    def advance(self, claim: Claim, progress: float, phase: str) -> bool:
        """Record the progress of a fit; return False if the claim is void, because the user was deleted."""
        with self.database.transaction():
            return self._set(claim, "progress = ?, phase = ?", progress, phase)

    def release(self, claim: Claim) -> None:
        """Release a claim: the fit is queued again, at its old place."""
        with self.database.transaction():
            self._set(claim, "state = 'queued', claim = NULL, attempts = attempts - 1, progress = 0, phase = NULL")

    @contextmanager
    def ending(self, claim: Claim) -> Iterator[bool]:
        """Yield whether the claim is valid, which cannot change while the block runs.

        The block puts the fitted record into the store and then calls `done`.
        """
        with self.database.transaction():
            query = "SELECT 1 FROM fits WHERE tenant = ? AND user = ? AND claim = ?"
            yield bool(self.database.read(query, (claim.tenant, key_of(claim.user), claim.number)))

    def done(self, claim: Claim, version: int | None, message: str | None) -> None:
        """Record that a fit is done and wrote this version."""
        with self.database.transaction():
            if self._set(claim, "version = ?, message = ?", version, message):
                self._end(claim, "done")

    def fail(self, claim: Claim, message: str) -> None:
        """Record that a fit failed, and why."""
        with self.database.transaction():
            if self._set(claim, "message = ?", message):
                self._end(claim, "failed")

    @contextmanager
    def lock(self, wait: bool = True) -> Iterator[bool]:
        """Hold the lock of the only fitting process; yields False if another process holds it and `wait` is False.

        Fits left behind by a process that died are queued again, or fail after `ATTEMPTS` attempts.
        """
        if self.database.read_only:
            raise read_only_error(self.database.path)
        with locked(lock_path(self.database.path), patience=None if wait else 0) as lock:
            if lock is not None:
                self._recover()
            yield lock is not None

    def _recover(self) -> None:
        left = self.database.read("SELECT tenant, user, claim, wanted, attempts FROM fits WHERE state = 'fitting'")
        for tenant, key, number, wanted, attempts in left:
            claim = Claim(tenant, user_of(key), number, wanted)
            if attempts >= ATTEMPTS:
                self.fail(claim, f"{attempts} processes died while they fitted this user")
            else:
                with self.database.transaction():
                    self._set(claim, "state = 'queued', claim = NULL, progress = 0, phase = NULL")

    def _end(self, claim: Claim, state: State) -> None:
        """End a claimed fit; if there were further requests since it began, it is queued again."""
        query = "SELECT wanted FROM fits WHERE tenant = ? AND user = ?"
        again = self.database.read(query, (claim.tenant, key_of(claim.user)))[0][0] > claim.wanted
        change = "state = ?, attempts = 0, claim = NULL, phase = NULL"
        if again:
            self._set(claim, f"{change}, progress = 0, message = NULL", "queued")
        else:
            self._set(claim, f"{change}, progress = CASE WHEN ?1 = 'done' THEN 1 ELSE progress END", state)
        self._next(state)

    def _set(self, claim: Claim, change: str, *values: object) -> bool:
        where = "tenant = ? AND user = ? AND claim = ?"
        key = (claim.tenant, key_of(claim.user), claim.number)
        return bool(self.database.write(f"UPDATE fits SET {change} WHERE {where}", (*values, *key)))

    def _next(self, name: str) -> int:
        """Increment a named counter and return it; a number is never returned twice."""
        self.database.write(
            "INSERT INTO counters VALUES (?, 1) ON CONFLICT (name) DO UPDATE SET value = value + 1", (name,)
        )
        return int(self.database.read("SELECT value FROM counters WHERE name = ?", (name,))[0][0])


def lock_path(database: Path) -> Path:
    """Return the file whose lock the fitting process holds."""
    return UsersFolder(database.parent).fits_lock
