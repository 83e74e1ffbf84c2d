"""SQL statements of the interaction log."""

from __future__ import annotations

from sqlalchemy import bindparam, delete, func, select

from proper.databases.statements import Statement, of_user, row_of
from proper.databases.tables import FITS, INTERACTIONS, UPDATES, USERS

_PAGE = 1000
"""Number of rows that a paginated query returns."""

KNOWS = Statement(lambda _: select(USERS.c.user).where(of_user(USERS)))
ADD_USER = Statement(lambda insert: insert(USERS).on_conflict_do_nothing())
_USERS = select(USERS.c.user).where(USERS.c.tenant == bindparam("tenant")).order_by(USERS.c.user).limit(_PAGE)
FIRST_USERS = Statement(lambda _: _USERS)
NEXT_USERS = Statement(lambda _: _USERS.where(USERS.c.user > bindparam("after")))
OWNERS = Statement(lambda _: select(USERS))
TEXTS = Statement(
    lambda _: (
        select(*(INTERACTIONS.c[name] for name in ("number", "tenant", "user", "prompt", "target", "id")))
        .where(INTERACTIONS.c.number > bindparam("last"))
        .order_by(INTERACTIONS.c.number)
        .limit(_PAGE)
    )
)
_OWN = of_user(INTERACTIONS)
ADD = Statement(
    lambda insert: insert(INTERACTIONS).values(row_of(INTERACTIONS, without="number")).on_conflict_do_nothing()
)
CONTENT = Statement(
    lambda _: select(INTERACTIONS.c.prompt, INTERACTIONS.c.target, INTERACTIONS.c.time).where(
        _OWN, INTERACTIONS.c.id == bindparam("id")
    )
)
COUNT = Statement(lambda _: select(func.count()).select_from(INTERACTIONS).where(_OWN))
OF = Statement(
    lambda _: (
        select(*(INTERACTIONS.c[name] for name in ("number", "id", "prompt", "target", "time", "received")))
        .where(_OWN)
        .order_by(INTERACTIONS.c.number)
    )
)
REMOVALS = [
    Statement(lambda _, table=table: delete(table).where(of_user(table)))  # type: ignore[misc]
    for table in (INTERACTIONS, FITS, UPDATES, USERS)
]
