"""Fit queue: one persistent row per user with the state of the user's latest fit, readable by any process.

    idle -> queued -> fitting -> done | failed        new interactions queue again, also while a fit runs

The fitting worker takes a claim; deleting a user (also if the user is enrolled anew) voids the claim. One process fits
at a time (an flock beside the file), so a fit in state "fitting" when a process acquires the lock was left behind by a
process that died, and is queued again.
"""

from __future__ import annotations

import secrets
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from sqlalchemy import Text, and_, bindparam, case, func, null, or_, select, update

from proper.adapters.manifest import key_of, user_of
from proper.databases.statements import Insert, Statement, of_user
from proper.databases.tables import COUNTERS, FITS
from proper.files import locked
from proper.interactions.database import Database
from proper.run_folder import UsersFolder
from proper.sqlite_files import read_only_error

_OWN = of_user(FITS)
_CLAIMED = and_(_OWN, FITS.c.claim == bindparam("number"))
_KEY = (FITS.c.tenant, FITS.c.user)


def _change(**values: object) -> Statement:
    """Return the statement that sets these columns in the row of a claim."""
    return Statement(lambda _: update(FITS).where(_CLAIMED).values(**values))


def _added(insert: Insert) -> Any:
    fitting, new = FITS.c.state == "fitting", insert(FITS)
    given: dict[str, Any] = {name: bindparam(name) for name in ("tenant", "user", "place")}
    return new.values(**given, state="queued", wanted=1, attempts=0, progress=0.0).on_conflict_do_update(
        index_elements=_KEY,
        set_={
            "wanted": FITS.c.wanted + 1,
            "attempts": 0,
            "place": case((FITS.c.state == "queued", FITS.c.place), else_=new.excluded.place),
            "progress": case((fitting, FITS.c.progress), else_=0.0),
            "phase": case((fitting, FITS.c.phase)),
            "message": case((fitting, FITS.c.message)),
            "state": case((fitting, FITS.c.state), else_="queued"),
        },
    )


_ADD = Statement(_added)
_FIT = Statement(
    lambda _: select(FITS.c.state, FITS.c.progress, FITS.c.phase, FITS.c.message, FITS.c.version).where(_OWN)
)
_STATES = Statement(lambda _: select(FITS.c.state, func.count()).group_by(FITS.c.state))
_ENDED = Statement(lambda _: select(COUNTERS.c.name, COUNTERS.c.value))
_WAITING = Statement(lambda _: select(*_KEY).where(or_(FITS.c.state == "queued", FITS.c.state == "fitting")))
_QUEUED = select(*_KEY, FITS.c.wanted).where(FITS.c.state == "queued").with_for_update(skip_locked=True)
_FIRST = Statement(lambda _: _QUEUED.order_by(FITS.c.place).limit(1))
_GIVEN = Statement(lambda _: _QUEUED.where(_OWN))
_TAKE = Statement(
    lambda _: (
        update(FITS)
        .where(_OWN)
        .values(
            state="fitting",
            claim=bindparam("number"),
            attempts=FITS.c.attempts + 1,
            progress=0.0,
            phase="waiting",
            message=null(),
        )
    )
)
_WANTED = Statement(lambda _: select(FITS.c.wanted).where(_CLAIMED))
_LEFT = Statement(
    lambda _: select(*_KEY, FITS.c.claim, FITS.c.wanted, FITS.c.attempts).where(FITS.c.state == "fitting")
)
_ADVANCE = _change(progress=bindparam("reached"), phase=bindparam("now_in"))
_RELEASE = _change(state="queued", claim=null(), attempts=FITS.c.attempts - 1, progress=0.0, phase=null())
_REQUEUE = _change(state="queued", claim=null(), progress=0.0, phase=null())
_TELL_DONE = _change(version=bindparam("written"), message=bindparam("said"))
_TELL_FAILED = _change(message=bindparam("said"))
_END_AGAIN = _change(state="queued", attempts=0, claim=null(), phase=null(), progress=0.0, message=null())
_END = _change(
    state=bindparam("ended"),
    attempts=0,
    claim=null(),
    phase=null(),
    progress=case((bindparam("ended", type_=Text) == "done", 1.0), else_=FITS.c.progress),
)
_COUNT = Statement(
    lambda insert: (
        insert(COUNTERS)
        .values(name=bindparam("name"), value=1)
        .on_conflict_do_update(index_elements=[COUNTERS.c.name], set_={"value": COUNTERS.c.value + 1})
    )
)

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
        with self.database.transaction((tenant, key_of(user))):
            self.database.write(_ADD, {"tenant": tenant, "user": key_of(user), "place": time.time_ns()})

    def fit(self, tenant: str, user: str) -> Fit:
        """Return the state of a user's latest fit."""
        rows = self.database.read(_FIT, {"tenant": tenant, "user": key_of(user)})
        return Fit(*rows[0]) if rows else Fit()

    def figures(self) -> QueueFigures:
        """Return the number of fits by state."""
        states, ended = dict(self.database.read(_STATES)), dict(self.database.read(_ENDED))
        return QueueFigures(
            states.get("queued", 0), states.get("fitting", 0), ended.get("done", 0), ended.get("failed", 0)
        )

    def waiting(self) -> list[tuple[str, str]]:
        """Return tenant and user of every fit that is queued or running."""
        return [(tenant, user_of(key)) for tenant, key in self.database.read(_WAITING)]

    def take(self, tenant: str | None = None, user: str | None = None) -> Claim | None:
        """Claim the user who has waited longest, or the given one; None if no such fit is queued."""
        with self.database.transaction():
            if tenant is None or user is None:
                rows = self.database.read(_FIRST)
            else:
                rows = self.database.read(_GIVEN, {"tenant": tenant, "user": key_of(user)})
            if not rows:
                return None
            (owner, key, wanted), number = rows[0], secrets.randbits(62)
            self.database.write(_TAKE, {"tenant": owner, "user": key, "number": number})
        return Claim(owner, user_of(key), number, wanted)

    def advance(self, claim: Claim, progress: float, phase: str) -> bool:
        """Record the progress of a fit; return False if the claim is void, because the user was deleted."""
        return self._set(_ADVANCE, claim, reached=progress, now_in=phase)

    def release(self, claim: Claim) -> None:
        """Release a claim: the fit is queued again, at its old place."""
        self._set(_RELEASE, claim)

    @contextmanager
    def ending(self, claim: Claim) -> Iterator[bool]:
        """Yield whether the claim is valid, which cannot change while the block runs.

        The block puts the fitted record into the store and then calls `done`.
        """
        with self.database.transaction(_owner(claim)):
            yield bool(self.database.read(_WANTED, _claimed(claim)))

    def done(self, claim: Claim, version: int | None, message: str | None) -> None:
        """Record that a fit is done and wrote this version."""
        with self.database.transaction(_owner(claim)):
            if self._set(_TELL_DONE, claim, written=version, said=message):
                self._end(claim, "done")

    def fail(self, claim: Claim, message: str) -> None:
        """Record that a fit failed, and why."""
        with self.database.transaction(_owner(claim)):
            if self._set(_TELL_FAILED, claim, said=message):
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
        for tenant, key, number, wanted, attempts in self.database.read(_LEFT):
            claim = Claim(tenant, user_of(key), number, wanted)
            if attempts >= ATTEMPTS:
                self.fail(claim, f"{attempts} processes died while they fitted this user")
            else:
                self._set(_REQUEUE, claim)

    def _end(self, claim: Claim, state: State) -> None:
        """End a claimed fit; if there were further requests since it began, it is queued again."""
        ((wanted,),) = self.database.read(_WANTED, _claimed(claim))
        if wanted > claim.wanted:
            self._set(_END_AGAIN, claim)
        else:
            self._set(_END, claim, ended=state)
        self.database.write(_COUNT, {"name": state})

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
