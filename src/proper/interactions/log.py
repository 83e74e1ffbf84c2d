"""Interaction log: durable when `append` returns, idempotent by id; appending queues a fit of the user.

All data is keyed by (tenant, user); an interaction also has an id, by default the hash of its content. `fit_queue`
tracks the fits.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from hashlib import blake2b
from pathlib import Path

from proper.adapters.manifest import key_of, user_of
from proper.adapters.tombstones import Tombstones
from proper.data.values import MAX_ID_LENGTH, is_written_null
from proper.databases.shared import Owner
from proper.errors import InputError
from proper.interactions import log_statements as sql
from proper.interactions.database import Database
from proper.interactions.deletion_jobs import Deletions
from proper.interactions.fit_queue import Claim, FitQueue
from proper.interactions.updates import Updates
from proper.run_folder import UsersFolder


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


class UserIdError(InputError):
    """An id is not text, or cannot be one user's."""


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


class InteractionLog:
    """The log of a store's folder, created if it does not exist. Thread-safe.

    Attributes:
        queue: the fit queue in the same database.
        updates: outcomes of updates, in the same database.
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
            UserIdError: `new` is set, and the id is not one user's, or too long.
            ExistsError: `new` is set and the user is known.
            DeletedError: the user is being deleted, or was deleted and `new` is not set.
            ConflictError: an id is already used with different content; names the id.
            StoreError: the log cannot be written.
        """
        if new:
            require_id(user)
        accepted = self._add(tenant, {user: entries}, (tenant, key_of(user)), new)
        return AppendResult(accepted, len(entries) - accepted)

    def enrol_all(self, tenant: str, entries: Mapping[str, Sequence[LogEntry]]) -> None:
        """Add new users with their interactions, and queue them for fits: all or none. Errors as for `append`."""
        for user in entries:
            require_id(user)
        self._add(tenant, entries, None, new=True)

    def _add(self, tenant: str, entries: Mapping[str, Sequence[LogEntry]], owner: Owner | None, new: bool) -> int:
        accepted, now = 0, time.time()
        # A tombstone is lifted last, since another user of the same transaction may be refused, and before the commit:
        # who is enrolled and has a tombstone would be deleted again. It comes back if the commit fails.
        with ExitStack() as lifted, self.database.transaction(owner):
            for user, own in entries.items():
                accepted += self._add_user(tenant, user, own, now, new)
            if new:
                lifted.enter_context(self.tombstones.lifted(tenant, entries.keys()))
        return accepted

    def _add_user(self, tenant: str, user: str, entries: Sequence[LogEntry], now: float, new: bool) -> int:
        self._require_present(tenant, user, new)
        key, accepted = key_of(user), 0
        added = self.database.write(sql.ADD_USER, {"tenant": tenant, "user": key})
        if new and not added:
            raise ExistsError(f"there is a user {user!r} already")
        for at, entry in enumerate(entries):
            accepted += self._insert(tenant, key, entry, at, now)
        if accepted:
            self.queue.add(tenant, user)
        return accepted

    def request_fit(self, tenant: str, user: str) -> None:
        """Queue a user for a fit, even without new interactions.

        Raises:
            DeletedError: the user was deleted meanwhile.
        """
        with self.database.transaction((tenant, key_of(user))):
            self._require_present(tenant, user, new=False)
            self.queue.add(tenant, user)

    def claim_fit(self, tenant: str, user: str) -> Claim | None:
        """Claim a user for a fit, whether one is queued or not; None while a worker fits the user.

        Raises:
            DeletedError: the user was deleted meanwhile.
        """
        with self.database.transaction((tenant, key_of(user))):
            self.request_fit(tenant, user)
            return self.queue.take(tenant, user)

    def _require_present(self, tenant: str, user: str, new: bool) -> None:
        """Require that a user is not deleted (inside a transaction, which a deletion waits for)."""
        if self.deletions.of(tenant, user) is not None:
            raise DeletedError(f"user {user!r} is being deleted; enrol the user again after the deletion")
        if not new and self.tombstones.has(tenant, user):
            raise DeletedError(f"user {user!r} was deleted; enrol the user to add the user again")

    def _insert(self, tenant: str, key: bytes, entry: LogEntry, at: int, now: float) -> bool:
        """Add one interaction; return whether it was new."""
        own = {"tenant": tenant, "user": key, "id": entry.key}
        content = {"prompt": entry.prompt, "target": entry.target, "time": entry.time}
        if self.database.write(sql.ADD, {**own, **content, "received": now}):
            return True
        if self.database.read(sql.CONTENT, own) != [tuple(content.values())]:
            what = f"the interaction {entry.key!r} of user {user_of(key)!r}"
            raise ConflictError(f"{what} exists already with other content", at)
        return False

    def knows(self, tenant: str, user: str) -> bool:
        """Return whether the log knows a user."""
        return bool(self.database.read(sql.KNOWS, {"tenant": tenant, "user": key_of(user)}))

    def users(self, tenant: str, after: str | None = None) -> Iterator[str]:
        """Yield a tenant's users, ordered by id in UTF-8, from the beginning or `after` a user."""
        if after is None:
            page = self.database.read(sql.FIRST_USERS, {"tenant": tenant})
        else:
            page = self.database.read(sql.NEXT_USERS, {"tenant": tenant, "after": key_of(after)})
        while page:
            yield from (user_of(key) for (key,) in page)
            page = self.database.read(sql.NEXT_USERS, {"tenant": tenant, "after": page[-1][0]})

    def owners(self) -> list[tuple[str, bytes]]:
        """Return tenant and key of every user of every tenant."""
        return self.database.read(sql.OWNERS)

    def texts(self) -> Iterator[tuple[str, bytes, str, str, str]]:
        """Yield tenant, key, prompt, target and id of every interaction of every user."""
        last = 0
        while page := self.database.read(sql.TEXTS, {"last": last}):
            yield from (tuple(row[1:]) for row in page)
            last = page[-1][0]

    def count(self, tenant: str, user: str) -> int:
        """Return the number of interactions of a user."""
        return int(self.database.read(sql.COUNT, {"tenant": tenant, "user": key_of(user)})[0][0])

    def interactions(self, tenant: str, user: str) -> list[LoggedInteraction]:
        """Return all of a user's interactions in the order of arrival."""
        rows = self.database.read(sql.OF, {"tenant": tenant, "user": key_of(user)})
        return [LoggedInteraction(*row) for row in rows]

    @contextmanager
    def deleting(self, tenant: str, user: str) -> Iterator[None]:
        """Remove all rows of a user when the block ends.

        Other writers wait meanwhile, no fit of the user can end after it, and if the block fails nothing is removed.
        The bytes are gone when this returns, unless another process still reads them: see `database.wipe`.
        """
        with self.database.transaction():
            self.queue.withdraw(tenant, user)
            for removal in sql.REMOVALS:
                self.database.write(removal, {"tenant": tenant, "user": key_of(user)})
            yield
        self.database.wipe(0)


def require_id(user: object) -> None:
    """Check the id of a new user, by the same rules as for the users of data files.

    Raises:
        UserIdError: it is not text of whole Unicode characters, is empty or too long, or is what programs write for a
            missing id.
    """
    if not isinstance(user, str):
        raise UserIdError(f"user {user!r}: an id is text")
    if not user.strip():
        raise UserIdError(f"user {user!r}: the id is empty")
    if len(user) > MAX_ID_LENGTH:
        raise UserIdError(f"user '{user[:40]}...': the id is longer than {MAX_ID_LENGTH} characters")
    if is_written_null(user):
        raise UserIdError(f"user {user!r}: this stands for a missing id")
    if user.encode(errors="replace").decode() != user:
        raise UserIdError(f"user {user!r}: half of a surrogate pair, which is no character")
