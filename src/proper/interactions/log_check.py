"""Consistency check of the interaction log: the database itself, every row, and that every row's user is known."""

from __future__ import annotations

from contextlib import closing
from pathlib import Path
from typing import get_args

from sqlalchemy import and_, exists, func, literal, or_, select

from proper.adapters.integrity import Finding, one_line
from proper.databases.location import is_made
from proper.databases.statements import Statement
from proper.databases.tables import FITS, INTERACTIONS, USERS
from proper.errors import StoreError, UnavailableError
from proper.interactions.fit_queue import State
from proper.interactions.log import InteractionLog
from proper.run_folder import UsersFolder

_UNKNOWN = ~exists().where(USERS.c.tenant == INTERACTIONS.c.tenant, USERS.c.user == INTERACTIONS.c.user)
_NO_FIT = or_(
    *(FITS.c.state.not_in([literal(state) for state in (*get_args(State), "withdrawn")]),),
    and_(FITS.c.state == "queued", FITS.c.place.is_(None)),
    and_(FITS.c.state == "fitting", FITS.c.claim.is_(None)),
)
# Queries that count rows no writer produces, each with the text of its finding.
_INVALID_ROWS = (
    (
        Statement(lambda _: select(func.count()).select_from(INTERACTIONS).where(_UNKNOWN)),
        "interactions of users whom the log does not know",
    ),
    (Statement(lambda _: select(func.count()).select_from(FITS).where(_NO_FIT)), "fits that are invalid"),
)
# The same for SQLite, whose columns accept any type.
_INVALID_TYPES = (
    (
        """SELECT count(*) FROM interactions WHERE typeof(id) <> 'text' OR typeof(prompt) <> 'text'
        OR typeof(target) <> 'text' OR typeof(user) <> 'blob' OR typeof(tenant) <> 'text'
        OR typeof(received) NOT IN ('real', 'integer') OR typeof(time) NOT IN ('real', 'integer', 'null')
        OR abs(received) > 1e300 OR abs(time) > 1e300""",
        "interactions that are invalid",
    ),
    (
        "SELECT count(*) FROM fits WHERE typeof(wanted) <> 'integer' OR typeof(attempts) <> 'integer'",
        "fits with wrong types",
    ),
    (
        """SELECT count(*) FROM interactions WHERE number >
        (SELECT coalesce(max(seq), 0) FROM sqlite_sequence WHERE name = 'interactions')""",
        "interactions beyond the last number that was given",
    ),
)


def check_log(users: Path) -> list[Finding]:
    """Return all problems of the log in a store's folder; an empty list if there is no log.

    There is no repair: the log's data is in no other file.
    """
    path = UsersFolder(users).log
    if not is_made(path) and not path.exists() and not path.is_symlink():
        return []
    try:
        with closing(InteractionLog(users)) as log:
            if messages := log.database.damage():
                return [Finding("log", one_line(path, text)) for text in messages]
            queries = (*_INVALID_ROWS, *(_INVALID_TYPES if log.database.engine == "sqlite" else ()))
            counts = [(log.database.read(query)[0][0], what) for query, what in queries]
    except UnavailableError:
        raise  # not damage
    except StoreError as error:
        return [Finding("log", one_line(path, str(error)))]
    return [Finding("log", f"{path}: {count} {what}") for count, what in counts if count]
