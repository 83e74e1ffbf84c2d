"""Table of updates: the outcome of each attempt to update a user, promoted or not.

It holds numbers and reasons, no texts; a user's rows are removed with the user's other data.
"""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from statistics import fmean
from typing import Any

from sqlalchemy import bindparam, delete, select

from proper.adapters.manifest import key_of
from proper.databases.statements import Statement, of_user, row_of
from proper.databases.tables import UPDATES
from proper.interactions.database import Database

_OWN = of_user(UPDATES)
_ADD = Statement(lambda insert: insert(UPDATES).values(row_of(UPDATES, without="number")))
_KEPT = select(UPDATES.c.number).where(_OWN).order_by(UPDATES.c.number.desc()).limit(bindparam("kept"))
_DROP = Statement(lambda _: delete(UPDATES).where(_OWN, UPDATES.c.number.not_in(_KEPT.scalar_subquery())))
_COLUMNS = [UPDATES.c[name] for name in ("ended", "base", "version", "seconds", "reason", "facts")]
_OF = Statement(lambda _: select(*_COLUMNS).where(_OWN).order_by(UPDATES.c.number.desc()))
_NEWEST = Statement(lambda _: select(UPDATES.c.seconds).order_by(UPDATES.c.number.desc()).limit(bindparam("count")))

KEPT = 20
"""Number of attempts kept per user."""
_TIMED = 50


@dataclass(frozen=True, slots=True)
class UpdateAttempt:
    """One attempt to update a user.

    Attributes:
        ended: when it ended, in seconds since 1970, UTC.
        base: the version in service then, from which the update was trained.
        version: the version that it became; None if it was not promoted.
        seconds: how long it took.
        reason: why it was promoted or not, in one line.
        metrics: the losses that were compared, and numbers of interactions; `logged` is how many the log had then.
    """

    ended: float
    base: int
    version: int | None
    seconds: float
    reason: str
    metrics: Mapping[str, Any]

    def as_json(self) -> dict[str, Any]:
        """Return the fields by name, as archives have them: there the metrics are called `facts`."""
        fields = asdict(self)
        fields["facts"] = fields.pop("metrics")
        return fields


class Updates:
    """The attempts in a log's database."""

    def __init__(self, database: Database) -> None:
        self.database = database

    def add(
        self,
        tenant: str,
        user: str,
        base: int,
        version: int | None,
        seconds: float,
        reason: str,
        metrics: Mapping[str, Any],
    ) -> None:
        """Add an attempt that has just ended, and drop the user's oldest beyond `KEPT`."""
        key = {"tenant": tenant, "user": key_of(user)}
        row = {"ended": time.time(), "base": base, "version": version, "seconds": seconds, "reason": reason}
        with self.database.transaction((tenant, key_of(user))):
            self.database.write(_ADD, {**key, **row, "facts": json.dumps(dict(metrics), ensure_ascii=False)})
            self.database.write(_DROP, {**key, "kept": KEPT})

    def of(self, tenant: str, user: str) -> list[UpdateAttempt]:
        """Return a user's attempts, newest first."""
        if not self.database.has_table("updates"):
            return []
        rows = self.database.read(_OF, {"tenant": tenant, "user": key_of(user)})
        return [
            UpdateAttempt(ended, base, version, seconds, reason, json.loads(metrics))
            for ended, base, version, seconds, reason, metrics in rows
        ]

    def seconds(self) -> float | None:
        """Return the mean seconds of the newest attempts of all users; None if there are none."""
        if not self.database.has_table("updates"):
            return None
        rows = self.database.read(_NEWEST, {"count": _TIMED})
        return fmean(seconds for (seconds,) in rows) if rows else None
