"""Data split: choose target users and assign every row to history, query or unused, in SQL over the narrow table.

Each rule selects candidate queries into the table `aside`; then targets are chosen, their candidates become queries,
and rows that would leak into training become unused.
"""

from __future__ import annotations

import sqlite3
from collections.abc import Callable

from proper.config import SplitConfig
from proper.data.database import get_meta, salt, set_meta
from proper.errors import DataError

AFTER_CUTOFF = "another user's row at or after the date"
ANOTHERS_QUESTION = "question of a user who is no target"
BEYOND_BUDGET = "query beyond split.max_queries"
HELD_OUT = "query, kept away from validation"
NO_TIME = "no time"
NO_HISTORY = "query of a user whose whole history was shared"
OTHERS_QUERY_ITEM = "another user's row with a query item"
OWN_QUESTION = "asks what a query of the same user asks"
SHARED = "shares an item or input with a query"


def assign(connection: sqlite3.Connection, split: SplitConfig, exclude: bool, given: bool = False) -> None:
    """Set `part` and `reason` of every row and `role` of every user.

    `given` uses the queries that the files name instead of `split.by`. `exclude` removes rows that share an item or a
    normalized input with a query from every user's history. For `evaluate_on: validation` the same rule is applied
    twice: the second pass splits the history that the first pass left, for the targets that the first pass chose.

    Raises:
        DataError: no user qualifies as a target, or the rule needs times and no row has one.
    """
    validation = split.evaluate_on == "validation"
    _pass(connection, split, exclude, "queries", split.max_queries if not validation else None, given)
    if validation:
        connection.execute("UPDATE rows SET part = 'unused', reason = ? WHERE part = 'query'", (HELD_OUT,))
        _pass(connection, split, exclude, "validation", split.max_queries)
    _count_users(connection)


def _pass(
    connection: sqlite3.Connection,
    split: SplitConfig,
    exclude: bool,
    name: str,
    limit: int | None,
    given: bool = False,
) -> None:
    connection.execute("CREATE TEMP TABLE aside(id INTEGER PRIMARY KEY)")
    if given:
        _by_files(connection)
    else:
        _RULES[split.by](connection, split, salt(name, split.by, split.seed))
    _choose_targets(connection, split, first=name == "queries")
    connection.execute("""
        UPDATE rows SET part = 'query' WHERE id IN aside
        AND user IN (SELECT number FROM users WHERE role = 'target')""")
    # For time-global and item, candidates of every user stay out of training; the other rules apply per user.
    reason = {"time-global": AFTER_CUTOFF, "item": OTHERS_QUERY_ITEM}.get(split.by) if not given else ANOTHERS_QUESTION
    if reason is not None:
        connection.execute(
            "UPDATE rows SET part = 'unused', reason = ? WHERE part = 'history' AND id IN aside", (reason,)
        )
    connection.execute("DROP TABLE aside")
    if limit is not None:
        _limit_queries(connection, limit, salt(name, "max_queries", split.seed))
    if exclude:
        _exclude_shared(connection)
        _drop_targets_without_history(connection)


def _by_files(connection: sqlite3.Connection) -> None:
    """Select the queries that the files name, and drop history rows of the same user with the same input."""
    connection.execute("INSERT INTO aside SELECT id FROM rows WHERE part = 'query' ORDER BY id")
    connection.execute(
        """
        UPDATE rows SET part = 'unused', reason = ? WHERE part = 'history' AND EXISTS (
            SELECT 1 FROM rows q WHERE q.user = rows.user AND q.part = 'query' AND q.prompt_key = rows.prompt_key)""",
        (OWN_QUESTION,),
    )
    connection.execute("UPDATE rows SET part = 'history' WHERE part = 'query'")


def _by_time(connection: sqlite3.Connection, split: SplitConfig, salted: bytes) -> None:
    _newest(connection, split.queries, salted, "CASE WHEN u.timed THEN -r.id ELSE scramble(r.digest, :salt) END")


def _by_chance(connection: sqlite3.Connection, split: SplitConfig, salted: bytes) -> None:
    _newest(connection, split.queries, salted, "scramble(r.digest, :salt)")


def _newest(connection: sqlite3.Connection, share: float, salted: bytes, order: str) -> None:
    """Select the first ceil(share * n) of each user's n rows in `order`; with several tasks, of the rows of each."""
    own = _own_rows(connection)
    # The 1e-9 compensates rounding: 0.07 * 100 = 7.000000000000001 must count as 7.
    connection.execute(
        f"""
        INSERT INTO aside SELECT id FROM (
            SELECT r.id, row_number() OVER (PARTITION BY {own} ORDER BY {order}) AS number,
                   count(*) OVER (PARTITION BY {own}) AS n
            FROM rows r JOIN users u ON u.number = r.user WHERE r.part = 'history')
        WHERE number <= CAST(n * :share - 1e-9 AS INTEGER) + 1 ORDER BY id""",
        {"salt": salted, "share": share},
    )


def _own_rows(connection: sqlite3.Connection) -> str:
    """Return the columns of `rows` (as r) whose rows are one user's of one task."""
    several = connection.execute("SELECT 1 FROM pragma_table_info('rows') WHERE name = 'task'").fetchone()
    return "r.user, r.task" if several else "r.user"


def _by_date(connection: sqlite3.Connection, split: SplitConfig, salted: bytes) -> None:
    connection.execute(
        "UPDATE rows SET part = 'unused', reason = ? WHERE part = 'history' AND time IS NULL", (NO_TIME,)
    )
    cutoff = _cutoff(connection, split.queries)
    set_meta(connection, "cutoff", cutoff)
    connection.execute(
        "INSERT INTO aside SELECT id FROM rows WHERE part = 'history' AND time >= ? ORDER BY id", (cutoff,)
    )


def _cutoff(connection: sqlite3.Connection, share: float) -> float:
    """Return the time for which the fraction of rows at or after it is nearest `share`, with a row before it."""
    timed = "FROM rows WHERE part = 'history'"
    n, earliest = connection.execute(f"SELECT count(*), min(time) {timed}").fetchone()
    if not n:
        raise DataError("split.by: 'time-global' needs times, and no row has one (data.time names their column)")
    index = min(int(n * (1 - share)), n - 1)
    at_index = connection.execute(f"SELECT time {timed} ORDER BY time LIMIT 1 OFFSET {index}").fetchone()[0]
    later = connection.execute(f"SELECT min(time) {timed} AND time > ?", (at_index,)).fetchone()[0]
    candidates = [date for date in (at_index, later) if date is not None and date > earliest]
    if not candidates:
        raise DataError("split.by: 'time-global' needs rows of two different times, and all have the same")

    def distance(date: float) -> float:
        after = connection.execute(f"SELECT count(*) {timed} AND time >= ?", (date,)).fetchone()[0]
        return abs(float(after / n) - share)

    return float(min(candidates, key=distance))


def _by_item(connection: sqlite3.Connection, split: SplitConfig, salted: bytes) -> None:
    threshold = int(split.queries * 2**64) - 2**63
    connection.execute(
        """INSERT INTO aside SELECT id FROM rows
        WHERE part = 'history' AND scramble(coalesce(item_key, prompt_key), ?) < ? ORDER BY id""",
        (salted, threshold),
    )


_RULES: dict[str, Callable[[sqlite3.Connection, SplitConfig, bytes], None]] = {
    "time": _by_time,
    "time-global": _by_date,
    "item": _by_item,
    "random": _by_chance,
}


def _choose_targets(connection: sqlite3.Connection, split: SplitConfig, first: bool) -> None:
    """Set role "target" for the users with the most history; later passes can only remove the role."""
    counts = """
        SELECT r.user, count(*) - count(a.id) AS history, count(a.id) AS queries
        FROM rows r LEFT JOIN aside a ON a.id = r.id WHERE r.part = 'history' GROUP BY r.user"""
    least = split.min_history if first else 1
    among = "" if first else "AND user IN (SELECT number FROM users WHERE role = 'target')"
    connection.execute(f"""
        CREATE TEMP TABLE chosen AS SELECT user FROM ({counts})
        WHERE history >= {least} AND queries >= 1 {among} ORDER BY history DESC, user LIMIT {split.target_users}""")
    connection.execute("""
        UPDATE users SET role = CASE WHEN number IN (SELECT user FROM chosen) THEN 'target' ELSE 'other' END""")
    found = connection.execute("SELECT count(*) FROM chosen").fetchone()[0]
    connection.execute("DROP TABLE chosen")
    if not found:
        raise DataError(_why_no_target(connection, split, least, counts))


def _why_no_target(connection: sqlite3.Connection, split: SplitConfig, least: int, counts: str) -> str:
    users, longest, askless = connection.execute(
        f"SELECT count(*), max(history), sum(history >= {least}) FROM ({counts})"
    ).fetchone()
    why = f"split.min_history: no user has {least} history rows and a query besides; of {users:,} users "
    if askless:  # with split.by: time-global, users who were active on one side of the date only
        return why + f"{askless:,} have that history, but no query; split.by: time gives every user queries"
    dropped = get_meta(connection, "duplicates")
    return (
        why
        + f"the longest history has {longest or 0:,} rows"
        + (f"; {dropped:,} rows repeat another one and do not count" if dropped else "")
        + (f"; lower it to {longest} or less, or add rows" if 0 < (longest or 0) < least else "")
    )


def _limit_queries(connection: sqlite3.Connection, limit: int, salted: bytes) -> None:
    """Keep `limit` queries, taken in rounds of one query per user (and task), users in random order in each round."""
    connection.execute(
        f"""
        UPDATE rows SET part = 'unused', reason = :reason WHERE part = 'query' AND id NOT IN (
            SELECT id FROM (
                SELECT r.id, r.user,
                    row_number() OVER (PARTITION BY {_own_rows(connection)} ORDER BY scramble(r.digest, :salt)) AS round
                FROM rows r WHERE r.part = 'query')
            ORDER BY round, scramble((SELECT u.id FROM users u WHERE u.number = user), :salt), id LIMIT :limit)""",
        {"reason": BEYOND_BUDGET, "salt": salted, "limit": limit},
    )


def _exclude_shared(connection: sqlite3.Connection) -> None:
    connection.execute(
        """
        UPDATE rows SET part = 'unused', reason = ? WHERE part = 'history' AND (
            item_key IN (SELECT item_key FROM rows WHERE part = 'query' AND item_key IS NOT NULL)
            OR prompt_key IN (SELECT prompt_key FROM rows WHERE part = 'query'))""",
        (SHARED,),
    )


def _drop_targets_without_history(connection: sqlite3.Connection) -> None:
    connection.execute("""
        CREATE TEMP TABLE dropped AS SELECT number FROM users WHERE role = 'target'
        AND number NOT IN (SELECT user FROM rows WHERE part = 'history')""")
    connection.execute(
        """UPDATE rows SET part = 'unused', reason = ?
        WHERE part = 'query' AND user IN (SELECT number FROM dropped)""",
        (NO_HISTORY,),
    )
    dropped = connection.execute(
        "UPDATE users SET role = 'other' WHERE number IN (SELECT number FROM dropped)"
    ).rowcount
    set_meta(connection, "dropped_targets", (get_meta(connection, "dropped_targets") or 0) + dropped)
    connection.execute("DROP TABLE dropped")
    if not connection.execute("SELECT count(*) FROM users WHERE role = 'target'").fetchone()[0]:
        raise DataError(
            "split.shared_items: 'exclude' leaves no target any history, since all of it shares items or inputs with "
            "queries; set split.shared_items to allow, or split.by to item"
        )


def _count_users(connection: sqlite3.Connection) -> None:
    connection.execute("""
        UPDATE users SET
            history = (SELECT count(*) FROM rows WHERE user = number AND part = 'history'),
            queries = (SELECT count(*) FROM rows WHERE user = number AND part = 'query')""")
