"""Consistency check of the interaction log: SQLite integrity, validity of rows, and that every row's user is known.

There is no repair, because the log's data is in no other file.
"""

from __future__ import annotations

from contextlib import closing
from pathlib import Path
from typing import get_args

from proper.adapters.integrity import Finding, one_line
from proper.errors import StoreError
from proper.interactions.fit_queue import State
from proper.interactions.log import InteractionLog
from proper.run_folder import UsersFolder

# Queries that count rows no writer produces, each with the text of its finding. SQLite columns accept any type.
_SENSE = (
    (
        """SELECT count(*) FROM interactions WHERE typeof(id) <> 'text' OR typeof(prompt) <> 'text'
        OR typeof(target) <> 'text' OR typeof(user) <> 'blob' OR typeof(tenant) <> 'text'
        OR typeof(received) NOT IN ('real', 'integer') OR typeof(time) NOT IN ('real', 'integer', 'null')
        OR abs(received) > 1e300 OR abs(time) > 1e300""",
        "interactions that make no sense",
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
        "fits that make no sense",
    ),
    (
        """SELECT count(*) FROM interactions WHERE number >
        (SELECT coalesce(max(seq), 0) FROM sqlite_sequence WHERE name = 'interactions')""",
        "interactions beyond the last number that was given",
    ),
)


def check_log(users: Path) -> list[Finding]:
    """Return all problems of the log in a store's folder; an empty list if there is no log."""
    path = UsersFolder(users).log
    if not path.exists() and not path.is_symlink():
        return []
    try:
        with closing(InteractionLog(users)) as log:
            said = [row[0] for row in log.database.read("PRAGMA integrity_check")]
            if said != ["ok"]:
                return [Finding("log", one_line(path, text)) for text in said]
            counts = [(log.database.read(query)[0][0], what) for query, what in _SENSE]
    except StoreError as error:
        return [Finding("log", one_line(path, str(error)))]
    return [Finding("log", f"{path}: {count} {what}") for count, what in counts if count]
