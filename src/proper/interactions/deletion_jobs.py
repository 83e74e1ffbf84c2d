"""Persistent deletion jobs: one row each in the log's database, so that a killed deletion can be resumed.

    running   the user's id is in the row: files, store or log may still have data of the user
    wiping    only this row's user id is left, in the log's write-ahead log, while another process reads
    done      all bytes are gone; the row reports this state for a week and names no user

`deletion` removes the data itself.
"""

from __future__ import annotations

import re
import secrets
import time
from dataclasses import dataclass
from typing import Literal

from sqlalchemy import bindparam, delete, null, select, update

from proper.adapters.manifest import key_of, user_of
from proper.databases.statements import Statement, Values, of_user
from proper.databases.tables import DELETIONS
from proper.interactions.database import Database

State = Literal["running", "wiping", "done"]
_FOUND = select(DELETIONS.c.job, DELETIONS.c.tenant, DELETIONS.c.user, DELETIONS.c.state)
_JOB = DELETIONS.c.job == bindparam("wanted")
_OF = Statement(lambda _: _FOUND.where(of_user(DELETIONS)))
_PENDING = Statement(lambda _: _FOUND.where(DELETIONS.c.state != "done"))
_OF_JOB = Statement(lambda _: _FOUND.where(DELETIONS.c.tenant == bindparam("tenant"), _JOB))
_FORGET = Statement(lambda _: delete(DELETIONS).where(DELETIONS.c.ended < bindparam("before")))
_BEGIN = Statement(lambda insert: insert(DELETIONS))
_WIPING = Statement(lambda _: update(DELETIONS).where(_JOB).values(user=null(), state="wiping"))
_DONE = Statement(lambda _: update(DELETIONS).where(_JOB).values(state="done", ended=bindparam("at")))

_ID = re.compile("[0-9a-f]{32}")
KEPT_SECONDS = 7 * 24 * 3600.0


@dataclass(frozen=True, slots=True)
class Deletion:
    """One deletion; `user` is None once no data of the user is left to be removed."""

    job: str
    tenant: str
    user: str | None
    state: State


class Deletions:
    """The table of deletions in a log's database."""

    def __init__(self, database: Database) -> None:
        self.database = database

    def begin(self, tenant: str, user: str) -> Deletion:
        """Record the deletion of a user durably and return it; if one is unfinished already, return that one."""
        with self.database.transaction():
            running = self.of(tenant, user)
            if running is not None:
                return running
            self.database.write(_FORGET, {"before": time.time() - KEPT_SECONDS})
            job = secrets.token_hex(16)
            row = {"job": job, "tenant": tenant, "user": key_of(user), "state": "running", "ended": None}
            self.database.write(_BEGIN, row)
        return Deletion(job, tenant, user, "running")

    def of(self, tenant: str, user: str) -> Deletion | None:
        """Return the unfinished deletion of a user; None if there is none."""
        return next(iter(self._found(_OF, {"tenant": tenant, "user": key_of(user)})), None)

    def pending(self) -> list[Deletion]:
        """Return the unfinished deletions of all tenants."""
        return self._found(_PENDING, {})

    def state(self, tenant: str, job: str) -> State | None:
        """Return the state of a tenant's deletion; None for one that is unknown, or finished long ago."""
        if not _ID.fullmatch(job):  # PostgreSQL refuses some texts, which come from a URL
            return None
        found = self._found(_OF_JOB, {"tenant": tenant, "wanted": job})
        return found[0].state if found else None

    def end(self, deletion: Deletion, patience: float) -> bool:
        """Erase the user's id and end a deletion; return False if a process reads for longer than `patience`."""
        with self.database.transaction():
            self.database.write(_WIPING, {"wanted": deletion.job})
        if not self.database.wipe(patience, deletion.user or ""):
            return False
        with self.database.transaction():
            self.database.write(_DONE, {"at": time.time(), "wanted": deletion.job})
        return True

    def _found(self, query: Statement, values: Values) -> list[Deletion]:
        if self.database.read_only and not self.database.has_table("deletions"):
            return []
        rows = self.database.read(query, values)
        return [Deletion(job, tenant, None if key is None else user_of(key), state) for job, tenant, key, state in rows]
