"""Fit queue: one persistent row per user with the state of the user's latest fit, readable by any process.

    idle -> queued -> fitting -> done | failed        new interactions queue again, also while a fit runs

The fitting worker takes a claim; deleting a user (also if the user is enrolled anew) voids the claim. How the claims of
a dead worker come back depends on the database:

    SQLite       one process fits at a time (an flock beside the file), so a fit in state "fitting" when a process
                 acquires the lock was left behind, and is queued again
    PostgreSQL   many workers take claims, each of another user (FOR UPDATE SKIP LOCKED); a claim whose lease has run
                 out, because no progress was reported for `LEASE_SECONDS`, is queued again

Who works in a user's work folder holds the claim on the user.
"""

from __future__ import annotations

import logging
import secrets
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from proper.adapters.manifest import key_of, user_of
from proper.databases.shared import NOTHING
from proper.databases.statements import Statement
from proper.errors import StoreError
from proper.files import locked
from proper.interactions import fit_statements as sql
from proper.interactions.database import Database
from proper.interactions.fit_statements import LEASE_SECONDS as LEASE_SECONDS
from proper.run_folder import UsersFolder
from proper.sqlite_files import read_only_error

logger = logging.getLogger(__name__)

State = Literal["idle", "queued", "fitting", "done", "failed"]
_POLL_SECONDS = 0.05
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
        self._many_workers = database.engine == "postgresql"
        self._fitting = threading.Lock()

    def add(self, tenant: str, user: str) -> None:
        """Queue a user; a queued user keeps the place in the queue, and a running fit is followed by another."""
        with self.database.transaction((tenant, key_of(user))):
            self.database.write(sql.ADD, {"tenant": tenant, "user": key_of(user), "place": time.time_ns()})

    def fit(self, tenant: str, user: str) -> Fit:
        """Return the state of a user's latest fit."""
        rows = self.database.read(sql.FIT, {"tenant": tenant, "user": key_of(user)})
        return Fit(*rows[0]) if rows else Fit()

    def figures(self) -> QueueFigures:
        """Return the number of fits by state."""
        states, ended = dict(self.database.read(sql.STATES)), dict(self.database.read(sql.ENDED))
        return QueueFigures(
            states.get("queued", 0), states.get("fitting", 0), ended.get("done", 0), ended.get("failed", 0)
        )

    def has_work(self) -> bool:
        """Return whether a fit is queued, or was left behind by a dead process; as fast with any number of users."""
        return bool(self.database.read(sql.ANY_WAITING))

    def waiting(self) -> list[tuple[str, str]]:
        """Return tenant and user of every fit that is queued or running."""
        return [(tenant, user_of(key)) for tenant, key in self.database.read(sql.WAITING)]

    def take(self, tenant: str | None = None, user: str | None = None) -> Claim | None:
        """Claim the user who has waited longest, or the given one; None if no such fit is queued."""
        with self.database.transaction("any"):
            if tenant is None or user is None:
                rows = self.database.read(sql.FIRST)
            else:
                rows = self.database.read(sql.GIVEN, {"tenant": tenant, "user": key_of(user)})
            if not rows:
                return None
            (owner, key, wanted), number = rows[0], secrets.randbits(62)
            self.database.write(sql.TAKE, {"tenant": owner, "user": key, "number": number})
        return Claim(owner, user_of(key), number, wanted)

    def advance(self, claim: Claim, progress: float, phase: str) -> bool:
        """Record the progress of a fit; return False if the claim is void, because the user was deleted."""
        return self._set(sql.ADVANCE, claim, new_progress=progress, new_phase=phase)

    def release(self, claim: Claim) -> None:
        """Release a claim: the fit is queued again, at its old place."""
        self._set(sql.RELEASE, claim)

    @contextmanager
    def holding(self, claims: Sequence[Claim]) -> Iterator[None]:
        """Keep claims while the block runs, however long it reports no progress; those not ended in it are released."""
        ended = threading.Event()

        def renew() -> None:
            while not ended.wait(LEASE_SECONDS / 6):
                try:
                    for claim in claims:
                        self._set(sql.RENEW, claim)
                except StoreError as error:  # the database may be back before the leases run out
                    logger.warning(f"claims on fits could not be renewed: {error}")

        thread = threading.Thread(target=renew, name="fit claims", daemon=True)
        if self._many_workers:
            thread.start()
        try:
            yield
        finally:
            ended.set()
            if self._many_workers:
                thread.join()
            for claim in claims:
                self.release(claim)  # has no effect on one that has ended
                self.leave(claim)

    @contextmanager
    def ending(self, claim: Claim) -> Iterator[bool]:
        """Yield whether the claim is valid, which cannot change while the block runs.

        The block puts the fitted record into the store and then calls `done`.
        """
        with self.database.transaction(_owner(claim)):
            yield bool(self.database.read(sql.WANTED, _claimed(claim)))

    def done(self, claim: Claim, version: int | None, message: str | None) -> None:
        """Record that a fit is done and wrote this version."""
        with self.database.transaction(_owner(claim)):
            if self._set(sql.RECORD_DONE, claim, new_version=version, new_message=message):
                self._end(claim, "done")

    def fail(self, claim: Claim, message: str) -> None:
        """Record that a fit failed, and why."""
        with self.database.transaction(_owner(claim)):
            if self._set(sql.RECORD_FAILURE, claim, new_message=message):
                self._end(claim, "failed")

    @contextmanager
    def lock(self, wait: bool = True) -> Iterator[bool]:
        """Hold the lock of the only fitting process, in PostgreSQL of the only thread of this process that fits.

        Yields False if another holds it and `wait` is False. Fits left behind by a process that died are queued again,
        or fail after `ATTEMPTS` attempts.
        """
        if self.database.read_only:
            raise read_only_error(self.database.path)
        if self._many_workers:
            held = self._fitting.acquire(blocking=wait)
            try:
                if held:
                    self._recover(sql.LEASE_OVER, sql.DROP_OVER)
                yield held
            finally:
                if held:
                    self._fitting.release()
            return
        with locked(lock_path(self.database.path), patience=None if wait else 0) as lock:
            if lock is not None:
                self._recover(sql.ALL_LEFT, sql.DROP_ALL)
            yield lock is not None

    @contextmanager
    def placing(self, tenant: str, user: str) -> Iterator[None]:
        """Keep other workers from storing a record of a user while the block does; one worker needs no lock for it."""
        if not self._many_workers:
            yield
            return
        with self.database.transaction((tenant, key_of(user))):
            yield

    @contextmanager
    def unclaimed(self, tenant: str, user: str) -> Iterator[bool]:
        """Yield whether no worker holds a claim on a user, which cannot change while the block runs."""
        own = {"tenant": tenant, "user": key_of(user)}
        with self.database.transaction((tenant, key_of(user))):
            yield self.database.read(sql.LOCKED, own) != [("fitting",)]

    def withdraw(self, tenant: str, user: str) -> None:
        """Void the claim on a user, if there is one (inside a transaction that deletes the user's row)."""
        rows = self.database.read(sql.CLAIM_OF, {"tenant": tenant, "user": key_of(user)})
        if rows:
            self.database.write(sql.WITHDRAW, {"number": rows[0][0], "placeholder": secrets.token_bytes(16)})

    def noticed(self, patience: float) -> bool:
        """Wait until every worker with a voided claim has noticed, and removed its files, or is dead.

        Returns False if one has not within `patience` (seconds).
        """
        deadline = time.monotonic() + patience
        while self.database.read(sql.VOIDED):
            with self.lock(wait=False):  # drops the voided claims of dead workers
                pass
            if not self.database.read(sql.VOIDED):
                break
            if time.monotonic() > deadline:
                return False
            time.sleep(_POLL_SECONDS)
        return True

    def leave(self, claim: Claim) -> None:
        """Say that a worker has finished with a claim, also one that was voided, and has removed its files."""
        self._drop_voided(sql.LEAVE, {"number": claim.number})

    def _drop_voided(self, statement: Statement, values: Mapping[str, object] = NOTHING) -> None:
        if self.database.read(sql.VOIDED):
            with self.database.transaction("any"):
                self.database.write(statement, values)

    def _recover(self, left: Statement, drop: Statement) -> None:
        """Queue again the fits of `left`, and remove the voided claims of dead workers."""
        self._drop_voided(drop)
        for tenant, key, number, wanted, attempts in self.database.read(left):
            claim = Claim(tenant, user_of(key), number, wanted)
            if attempts >= ATTEMPTS:
                self.fail(claim, f"{attempts} processes died while they fitted this user")
            else:
                self._set(sql.REQUEUE, claim)

    def _end(self, claim: Claim, state: State) -> None:
        """End a claimed fit; if there were further requests since it began, it is queued again."""
        ((wanted,),) = self.database.read(sql.WANTED, _claimed(claim))
        if wanted > claim.wanted:
            self._set(sql.END_AGAIN, claim)
        else:
            self._set(sql.END, claim, new_state=state)
        self.database.write(sql.COUNT, {"name": state})

    def _set(self, statement: Statement, claim: Claim, **values: object) -> bool:
        """Change the row of a claim; return False if the claim is void."""
        with self.database.transaction(_owner(claim)):
            return bool(self.database.write(statement, {**_claimed(claim), **values}))


def _owner(claim: Claim) -> tuple[str, bytes]:
    return claim.tenant, key_of(claim.user)


def _claimed(claim: Claim) -> dict[str, object]:
    return {"tenant": claim.tenant, "user": key_of(claim.user), "number": claim.number}


def lock_path(database: Path) -> Path:
    """Return the file whose lock the fitting process holds."""
    return UsersFolder(database.parent).fits_lock
