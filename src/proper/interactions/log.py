"""The log of interactions: durable when `append` returns, idempotent by id, and the beginning of every fit.

The key of everything is (tenant, user); an interaction has an id besides, by default the hash of its content. Knows
nothing about models, and what becomes of a fit is the queue's affair.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from hashlib import blake2b
from pathlib import Path

from proper.adapters.manifest import key_of, user_of
from proper.adapters.tombstones import Tombstones
from proper.errors import InputError
from proper.interactions.database import FILE, Database
from proper.interactions.deletion_jobs import Deletions
from proper.interactions.fit_queue import FitQueue

_PAGE = 1000


class ConflictError(InputError):
    """An interaction's id is taken by one of other content.

    Attributes:
        at: which of the interactions handed in, from 0.
    """

    def __init__(self, message: str, at: int) -> None:
        super().__init__(message)
        self.at = at


class ExistsError(InputError):
    """The user is known already."""


class DeletedError(InputError):
    """The user was deleted, or is being deleted just now."""


@dataclass(frozen=True, slots=True)
class LogEntry:
    """One interaction of a user, in final texts.

    Attributes:
        prompt: what the model is asked.
        target: what it should have answered.
        time: when, in seconds since 1970, UTC; None where nobody said.
        id: the user's own name for it; None takes a hash of the rest.
    """

    prompt: str
    target: str
    time: float | None = None
    id: str | None = None

    @property
    def key(self) -> str:
        """The id, or what stands for it."""
        if self.id is not None:
            return self.id
        content = json.dumps([self.prompt, self.target, self.time])
        return f"content-{blake2b(content.encode(), digest_size=16).hexdigest()}"


@dataclass(frozen=True, slots=True)
class LoggedInteraction:
    """One interaction of the log.

    Attributes:
        number: grows with arrival.
        received: when it arrived, in seconds since 1970, UTC.
    """

    number: int
    id: str
    prompt: str
    target: str
    time: float | None
    received: float


@dataclass(frozen=True)
class AppendResult:
    """How many interactions were new, and how many the log had."""

    accepted: int
    duplicates: int


@dataclass(frozen=True)
class Known:
    """Whether the log knew a user, and whether somebody fits them just now."""

    known: bool
    fitting: bool


class InteractionLog:
    """The log of a store's folder, made if it is not there. Methods are for any thread.

    Attributes:
        queue: the fits that follow from it.
        deletions: those that are not over yet.
    """

    def __init__(self, folder: Path) -> None:
        self.database = Database(folder / FILE)
        self.queue = FitQueue(self.database)
        self.deletions = Deletions(self.database)
        self.tombstones = Tombstones(folder)

    def close(self) -> None:
        """Close the file."""
        self.database.close()

    def append(self, tenant: str, user: str, entries: Sequence[LogEntry], *, new: bool = False) -> AppendResult:
        """Add interactions, all or none, and queue the user for a fit if there is anything new to fit.

        Args:
            tenant: whose user.
            user: anybody; a user that was unknown is known afterwards, also without interactions.
            entries: in their order.
            new: whether the user must be unknown to the log; one who was deleted may come back in this way only.

        Raises:
            ExistsError: the user is known, and `new`.
            DeletedError: the user is being deleted, or was and is not `new`.
            ConflictError: an id is taken by other content; names it.
            StoreError: it cannot be written.
        """
        key, accepted, now = key_of(user), 0, time.time()
        with self.database.transaction():
            self._require_present(tenant, user, new)
            added = self.database.write("INSERT OR IGNORE INTO people VALUES (?, ?)", (tenant, key))
            if new and not added:
                raise ExistsError(f"there is a user {user!r} already")
            for at, entry in enumerate(entries):
                accepted += self._insert(tenant, key, entry, at, now)
            if accepted:
                self.queue.add(tenant, user)
            if new:
                self.tombstones.lift(tenant, user)
        return AppendResult(accepted, len(entries) - accepted)

    def request_fit(self, tenant: str, user: str) -> None:
        """Queue a user for a fit, whether or not there is anything new.

        Raises:
            DeletedError: the user was deleted meanwhile.
        """
        with self.database.transaction():
            self._require_present(tenant, user, new=False)
            self.queue.add(tenant, user)

    def _require_present(self, tenant: str, user: str, new: bool) -> None:
        """See that a user is not deleted (inside a transaction, which a deletion waits for)."""
        if self.deletions.of(tenant, user) is not None:
            raise DeletedError(f"user {user!r} is being deleted; enrol them again when that is over")
        if not new and self.tombstones.has(tenant, user):
            raise DeletedError(f"user {user!r} was deleted; enrol them to have them back")

    def _insert(self, tenant: str, key: bytes, entry: LogEntry, at: int, now: float) -> bool:
        """Add one interaction; return whether it was new."""
        values = (entry.prompt, entry.target, entry.time)
        added = self.database.write(
            """INSERT OR IGNORE INTO interactions (tenant, user, id, prompt, target, time, received)
            VALUES (?, ?, ?, ?, ?, ?, ?)""",
            (tenant, key, entry.key, *values, now),
        )
        if added:
            return True
        query = "SELECT prompt, target, time FROM interactions WHERE tenant = ? AND user = ? AND id = ?"
        if self.database.read(query, (tenant, key, entry.key)) != [values]:
            raise ConflictError(f"the interaction {entry.key!r} is there already with other content", at)
        return False

    def knows(self, tenant: str, user: str) -> bool:
        """Whether the log has heard of a user."""
        return bool(self.database.read("SELECT 1 FROM people WHERE tenant = ? AND user = ?", (tenant, key_of(user))))

    def people(self, tenant: str, after: str | None = None) -> Iterator[str]:
        """Yield a tenant's users, ordered by id in UTF-8, from the beginning or `after` a user."""
        query = f"SELECT user FROM people WHERE tenant = ? AND user > ? ORDER BY user LIMIT {_PAGE}"
        first = query if after is not None else query.replace("user > ?", "user >= ?")
        page = self.database.read(first, (tenant, b"" if after is None else key_of(after)))
        while page:
            yield from (user_of(key) for (key,) in page)
            page = self.database.read(query, (tenant, page[-1][0]))

    def count(self, tenant: str, user: str) -> int:
        """How many interactions of a user there are."""
        query = "SELECT count(*) FROM interactions WHERE tenant = ? AND user = ?"
        return int(self.database.read(query, (tenant, key_of(user)))[0][0])

    def interactions(self, tenant: str, user: str) -> list[LoggedInteraction]:
        """Return all of a user's interactions in the order of arrival."""
        rows = self.database.read(
            """SELECT number, id, prompt, target, time, received FROM interactions
            WHERE tenant = ? AND user = ? ORDER BY number""",
            (tenant, key_of(user)),
        )
        return [LoggedInteraction(*row) for row in rows]

    @contextmanager
    def deleting(self, tenant: str, user: str) -> Iterator[Known]:
        """Remove all of a user when the block ends; yields what there was.

        Nobody writes meanwhile, no fit of the user can end after it, and if the block fails nothing is removed. The
        bytes are gone when this returns, but for those that another process still reads: `database.wipe` says so.
        """
        key = key_of(user)
        with self.database.transaction():
            found = Known(self.knows(tenant, user), self.queue.fit(tenant, user).state == "fitting")
            for table in ("interactions", "fits", "people"):
                self.database.write(f"DELETE FROM {table} WHERE tenant = ? AND user = ?", (tenant, key))
            yield found
        self.database.wipe(0)
