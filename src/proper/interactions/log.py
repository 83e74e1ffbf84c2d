"""Interaction log: durable when `append` returns, idempotent by id; appending queues a fit of the user.

All data is keyed by (tenant, user); an interaction also has an id, by default the hash of its content. `fit_queue`
tracks the fits.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass
from hashlib import blake2b
from pathlib import Path
from typing import get_args

from proper.adapters.integrity import Finding, one_line
from proper.adapters.manifest import key_of, user_of
from proper.adapters.tombstones import Tombstones
from proper.errors import InputError, StoreError
from proper.interactions.database import Database
from proper.interactions.deletion_jobs import Deletions
from proper.interactions.fit_queue import FitQueue, State
from proper.interactions.updates import Updates
from proper.run_folder import UsersFolder

_PAGE = 1000

# Queries that count rows no writer produces, each with the text of its finding. SQLite columns accept any type.
_INVALID_ROWS = (
    (
        """SELECT count(*) FROM interactions WHERE typeof(id) <> 'text' OR typeof(prompt) <> 'text'
        OR typeof(target) <> 'text' OR typeof(user) <> 'blob' OR typeof(tenant) <> 'text'
        OR typeof(received) NOT IN ('real', 'integer') OR typeof(time) NOT IN ('real', 'integer', 'null')
        OR abs(received) > 1e300 OR abs(time) > 1e300""",
        "interactions that are invalid",
    ),
    (
        """SELECT count(*) FROM interactions WHERE NOT EXISTS (SELECT 1 FROM people
        WHERE people.tenant = interactions.tenant AND people.user = interactions.user)""",
        "interactions of users whom the log does not know",
    ),
    (
        f"""SELECT count(*) FROM fits WHERE state NOT IN ({", ".join(f"'{state}'" for state in get_args(State))})
        OR (state = 'queued' AND place IS NULL) OR (state = 'fitting' AND claim IS NULL)
        OR typeof(wanted) <> 'integer' OR typeof(attempts) <> 'integer'""",
        "fits that are invalid",
    ),
    (
        """SELECT count(*) FROM interactions WHERE number >
        (SELECT coalesce(max(seq), 0) FROM sqlite_sequence WHERE name = 'interactions')""",
        "interactions beyond the last number that was given",
    ),
)


class ConflictError(InputError):
    """An interaction's id is already used with different content.

    Attributes:
        at: index of the interaction among those passed in, from 0.
    """

    def __init__(self, message: str, at: int) -> None:
        super().__init__(message)
        self.at = at


class ExistsError(InputError):
    """The log already knows the user."""


class DeletedError(InputError):
    """The user was deleted, or is being deleted."""


@dataclass(frozen=True, slots=True)
class LogEntry:
    """One interaction of a user to be appended, with final texts (templates already filled in).

    Attributes:
        prompt: the model's input.
        target: the answer the model should have given.
        time: time of the interaction, in seconds since 1970, UTC; None if unknown.
        id: an id chosen by the caller; None takes a hash of the other fields.
    """

    prompt: str
    target: str
    time: float | None = None
    id: str | None = None

    @property
    def key(self) -> str:
        """The id or, without one, the hash of the content."""
        if self.id is not None:
            return self.id
        content = json.dumps([self.prompt, self.target, self.time])
        return f"content-{blake2b(content.encode(), digest_size=16).hexdigest()}"


@dataclass(frozen=True, slots=True)
class LoggedInteraction:
    """One interaction stored in the log.

    Attributes:
        number: increases in the order of arrival.
        received: time of arrival, in seconds since 1970, UTC.
    """

    number: int
    id: str
    prompt: str
    target: str
    time: float | None
    received: float


@dataclass(frozen=True)
class AppendResult:
    """How many interactions were new, and how many the log already had."""

    accepted: int
    duplicates: int


@dataclass(frozen=True)
class Known:
    """Whether the log knew a user, and whether the user was being fitted."""

    known: bool
    fitting: bool


class InteractionLog:
    """The log of a store's folder, created if it does not exist. Thread-safe.

    Attributes:
        queue: the fit queue in the same database.
        updates: what came of updates, in the same database.
        deletions: the deletion jobs in the same database.
    """

    def __init__(self, folder: Path) -> None:
        self.database = Database(UsersFolder(folder).log)
        self.queue = FitQueue(self.database)
        self.updates = Updates(self.database)
        self.deletions = Deletions(self.database)
        self.tombstones = Tombstones(folder)

    def close(self) -> None:
        """Close the file."""
        self.database.close()

    def append(self, tenant: str, user: str, entries: Sequence[LogEntry], *, new: bool = False) -> AppendResult:
        """Add interactions, all or none, and queue the user for a fit if any of them is new.

        Args:
            tenant: the user's tenant.
            user: any user; an unknown user is known afterwards, even without interactions.
            entries: the interactions, in order.
            new: whether the user must be unknown to the log; a deleted user can be enrolled again only with `new`.

        Raises:
            ExistsError: `new` is set and the user is known.
            DeletedError: the user is being deleted, or was deleted and `new` is not set.
            ConflictError: an id is already used with different content; names the id.
            StoreError: the log cannot be written.
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
        """Queue a user for a fit, even without new interactions.

        Raises:
            DeletedError: the user was deleted meanwhile.
        """
        with self.database.transaction():
            self._require_present(tenant, user, new=False)
            self.queue.add(tenant, user)

    def _require_present(self, tenant: str, user: str, new: bool) -> None:
        """Require that a user is not deleted (inside a transaction, which a deletion waits for)."""
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
        """Return whether the log knows a user."""
        return bool(self.database.read("SELECT 1 FROM people WHERE tenant = ? AND user = ?", (tenant, key_of(user))))

    def users(self, tenant: str, after: str | None = None) -> Iterator[str]:
        """Yield a tenant's users, ordered by id in UTF-8, from the beginning or `after` a user."""
        select, order = "SELECT user FROM people WHERE tenant = ?", f"ORDER BY user LIMIT {_PAGE}"
        following = f"{select} AND user > ? {order}"
        keys = (tenant,) if after is None else (tenant, key_of(after))
        page = self.database.read(f"{select} {order}" if after is None else following, keys)
        while page:
            yield from (user_of(key) for (key,) in page)
            page = self.database.read(following, (tenant, page[-1][0]))

    def count(self, tenant: str, user: str) -> int:
        """Return the number of interactions of a user."""
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
        """Remove all rows of a user when the block ends; yields what the log knew of the user.

        Other writers wait meanwhile, no fit of the user can end after it, and if the block fails nothing is removed.
        The bytes are gone when this returns, unless another process still reads them: see `database.wipe`.
        """
        key = key_of(user)
        with self.database.transaction():
            found = Known(self.knows(tenant, user), self.queue.fit(tenant, user).state == "fitting")
            for table in ("interactions", "fits", "updates", "people"):
                self.database.write(f"DELETE FROM {table} WHERE tenant = ? AND user = ?", (tenant, key))
            yield found
        self.database.wipe(0)


def check_log(users: Path) -> list[Finding]:
    """Return all problems of the log in a store's folder; an empty list if there is no log.

    Checks the SQLite file, every row, and that every row's user is known. There is no repair: the log's data is in no
    other file.
    """
    path = UsersFolder(users).log
    if not path.exists() and not path.is_symlink():
        return []
    try:
        with closing(InteractionLog(users)) as log:
            messages = [row[0] for row in log.database.read("PRAGMA integrity_check")]
            if messages != ["ok"]:
                return [Finding("log", one_line(path, text)) for text in messages]
            counts = [(log.database.read(query)[0][0], what) for query, what in _INVALID_ROWS]
    except StoreError as error:
        return [Finding("log", one_line(path, str(error)))]
    return [Finding("log", f"{path}: {count} {what}") for count, what in counts if count]
