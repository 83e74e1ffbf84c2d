"""Checks of prepared data before training and evaluation: no query leaks into training, and every task has queries.

Also the queries and users that training has covered. All is measured on the database itself, independently of the code
that made the split.
"""

from __future__ import annotations

import sqlite3

from proper.data.database import get_meta
from proper.data.dataset import Dataset, Sample
from proper.errors import DataError

# A query's own row is found by content (digest), not by id: an id has exactly one part by construction.
_OWN_ROW = "SELECT id FROM rows WHERE part = 'query' AND digest IN (SELECT digest FROM rows WHERE part = 'history')"
_ITEM = """SELECT id FROM rows WHERE part = 'query'
    AND item_key IN (SELECT item_key FROM rows WHERE part = 'history' AND item_key IS NOT NULL)"""
_INPUT = """SELECT id FROM rows WHERE part = 'query'
    AND prompt_key IN (SELECT prompt_key FROM rows WHERE part = 'history')"""


# In a derived dataset, the other rows whose text is in a prompt must be earlier history of the same user.
_SOURCE = """SELECT s.row AS id FROM sources s JOIN rows r ON r.id = s.row JOIN rows o ON o.id = s.source
    JOIN users u ON u.number = r.user
    WHERE o.part <> 'history' OR o.user <> r.user OR (u.timed AND o.time >= r.time)"""


def require_no_leaks(dataset: Dataset) -> None:
    """Check that no query leaks into training; see `leaks`.

    Raises:
        DataError: a query leaks; the message names the first and counts the rest.
    """
    found = leaks(dataset)
    if found:
        more = f" ({len(found) - 1:,} more)" if len(found) > 1 else ""
        raise DataError(f"{get_meta(dataset.connection, 'path')}: leak: {found[0]}{more}; nothing is evaluated")


def require_queries(dataset: Dataset) -> None:
    """Require a query of every task; none is left after all target users were deleted.

    Raises:
        DataError: a task has no query; names it.
    """
    for name in _unasked_tasks(dataset):
        path, of = get_meta(dataset.connection, "path"), f" of task '{name}'" if name else ""
        raise DataError(f"{path}: no query{of} is left, since all target users were deleted; nothing is evaluated")


def require_query_of_each_task(dataset: Dataset) -> None:
    """Require a query of every task of newly prepared data, before a run of several trains on it.

    Raises:
        DataError: a task has no query; names it.
    """
    for name in _unasked_tasks(dataset):
        raise DataError(
            f"tasks.{name}: no query, since no target user has a row of it to ask; raise split.target_users or "
            "split.max_queries, lower split.min_history, or leave the task out"
        )


def _unasked_tasks(dataset: Dataset) -> list[str]:
    task = "task" if dataset.tasks else "0"
    found = {row[0] for row in dataset.connection.execute(f"SELECT DISTINCT {task} FROM rows WHERE part = 'query'")}
    return [name for number, name in enumerate(dataset.tasks or ("",)) if number not in found]


def _measures(connection: sqlite3.Connection) -> dict[str, str]:
    """Return SQL for the ids of leaking queries, by kind of leak."""
    measures = {"its own row": _OWN_ROW}
    if get_meta(connection, "shared_items") == "exclude":
        measures |= {"its item": _ITEM, "its input": _INPUT}
    if connection.execute("SELECT 1 FROM sqlite_master WHERE name = 'sources'").fetchone():
        measures |= {"what is not earlier": _SOURCE}
    return measures


def leaking_rows(connection: sqlite3.Connection) -> int:
    """Return the number of rows that `leaks` names, each once."""
    queries = " UNION ".join(_measures(connection).values())
    return int(connection.execute(f"SELECT count(*) FROM ({queries})").fetchone()[0])


def leaks(dataset: Dataset) -> list[str]:
    """List every leak: a query's own row (under `exclude` also its item or input) in training, or a later source."""
    connection, found = dataset.connection, []
    for what, query in _measures(connection).items():
        rows = connection.execute(f"""
            SELECT r.id, u.id FROM rows r JOIN users u ON u.number = r.user WHERE r.id IN ({query}) ORDER BY r.id""")
        where = "its prompt" if query is _SOURCE else "training"
        kind = "row" if query is _SOURCE else "query"
        found += [f"{kind} {row} of user '{user}': {what} is in {where}" for row, user in rows]
    return found


_SEEN = """SELECT q.id FROM rows q JOIN (
    SELECT {key} AS key, min(user) AS low, max(user) AS high FROM rows WHERE part = 'history' GROUP BY {key}) h
    ON h.key = q.{key} WHERE q.part = 'query' AND (h.low <> q.user OR h.high <> q.user)"""


def queries_seen_by_others(dataset: Dataset) -> set[int]:
    """Return the ids of queries whose item (or normalized input if there is no item) is in another user's history."""
    # Grouped first: an item with many queries and histories would otherwise give a row for each pair of them.
    found = dataset.connection.execute(f"""
        {_SEEN.format(key="item_key")} UNION {_SEEN.format(key="prompt_key")} AND q.item_key IS NULL""")
    return {row for (row,) in found}


def targets_outside(dataset: Dataset, sample: Sample) -> set[str]:
    """Return the target users with no row in the sample."""
    found = dataset.connection.execute(f"""
        SELECT id FROM users WHERE role = 'target' AND number NOT IN (
            SELECT r.user FROM {sample.table} s JOIN rows r ON r.id = s.id)""")
    return {user for (user,) in found}
