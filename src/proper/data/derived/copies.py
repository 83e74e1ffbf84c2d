"""Copies of a prepared dataset: with shuffled users, shortened histories, other queries or new prompts.

Queries, users, times and roles stay, unless a function says otherwise, so that methods on both datasets answer the same
queries.
"""

from __future__ import annotations

import sqlite3
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path

from proper.data.database import copy, get_meta, salt, set_meta
from proper.data.dataset import Dataset
from proper.errors import DataError, ProperError
from proper.files import atomic_path, hash_value

Count = Callable[[str, str], int]
"""Function from a prompt and a target to their joint length in tokens, untruncated."""

HELD_OUT = "query of the run, in a data set that asks for held-out items instead"
SHORTENED = "older than the history that is kept"
ASKS_OTHERWISE = "asks for something else"

SOURCES = "CREATE TABLE sources(row INTEGER NOT NULL, source INTEGER NOT NULL)"
"""Table of a derived file: the rows whose texts a row's prompt also contains; the leak check reads it."""


@dataclass(frozen=True)
class Rewritten:
    """A row's new prompt.

    Attributes:
        tokens: tokens of prompt and target together, untruncated.
        sources: ids of the other rows whose texts are in the prompt.
        cut: whether text was left out to fit the model's maximum length.
    """

    row: int
    prompt: str
    tokens: int
    sources: tuple[int, ...] = ()
    cut: bool = False


@contextmanager
def _copy(source: Dataset, path: Path, name: str) -> Iterator[sqlite3.Connection]:
    """Yield a writable copy of `source` that is moved to `path` if the block succeeds."""
    with atomic_path(path) as temporary:
        try:
            with closing(copy(source.connection, temporary)) as connection:
                connection.execute("BEGIN")
                yield connection
                set_meta(connection, "sha256", hash_value([source.sha256, name]))
                connection.execute("COMMIT")
        except sqlite3.Error as error:
            raise ProperError(f"{path}: cannot be written: {error}") from error


def shuffle_users(source: Dataset, path: Path, seed: int) -> None:
    """Permute the texts of history rows across users, within targets and within the others (shuffled control).

    Users keep the number and times of their rows; the link between user and text is lost. Queries stay unchanged.
    """
    with _copy(source, path, f"shuffled {seed}") as connection:
        connection.execute(
            """CREATE TEMP TABLE slots AS SELECT r.id AS row, u.role AS role,
                   row_number() OVER (PARTITION BY u.role ORDER BY r.id) AS number
            FROM rows r JOIN users u ON u.number = r.user WHERE r.part = 'history'"""
        )
        connection.execute(
            """CREATE TEMP TABLE contents AS SELECT r.text, r.tokens, r.digest, r.item_key, r.prompt_key,
                   u.role AS role,
                   row_number() OVER (PARTITION BY u.role ORDER BY scramble(r.digest, ?), r.id) AS number
            FROM rows r JOIN users u ON u.number = r.user WHERE r.part = 'history'""",
            (salt("shuffled", seed),),
        )
        connection.execute("CREATE INDEX temp.by_number ON contents(role, number)")
        connection.execute("CREATE INDEX temp.by_row ON slots(row)")
        connection.execute("""
            UPDATE rows SET (text, tokens, digest, item_key, prompt_key) = (
                SELECT c.text, c.tokens, c.digest, c.item_key, c.prompt_key
                FROM slots s JOIN contents c ON c.role = s.role AND c.number = s.number WHERE s.row = rows.id)
            WHERE part = 'history'""")


def shorten_histories(source: Dataset, path: Path, keep: int) -> None:
    """Keep only the newest `keep` history rows of every target user; other users and queries stay unchanged."""
    with _copy(source, path, f"shortened {keep}") as connection:
        connection.execute(
            """UPDATE rows SET part = 'unused', reason = ? WHERE id IN (
                SELECT id FROM (
                    SELECT r.id, row_number() OVER (PARTITION BY r.user ORDER BY r.id DESC) AS age
                    FROM rows r JOIN users u ON u.number = r.user WHERE r.part = 'history' AND u.role = 'target')
                WHERE age > ?)""",
            (SHORTENED, keep),
        )
        _recount(connection)


def ask_held_out(source: Dataset, path: Path, held: Mapping[str, int], most: int) -> None:
    """Ask for the newest `held` history rows of each target user in place of the queries, at most for `most` rows.

    These are taken in rounds of one row per user, the newest first; the other held-out rows are left out. Any row may
    share its item with another user's held-out row, as it may with another row of the history.
    """
    with _copy(source, path, f"held out {hash_value([dict(held), most])}") as connection:
        connection.execute("UPDATE rows SET part = 'unused', reason = ? WHERE part = 'query'", (HELD_OUT,))
        connection.execute("CREATE TEMP TABLE held(user TEXT PRIMARY KEY, amount INTEGER)")
        connection.executemany("INSERT INTO held VALUES (?, ?)", held.items())
        connection.execute("""
            CREATE TEMP TABLE newest AS SELECT id, round, row_number() OVER (ORDER BY round, id) AS number FROM (
                SELECT r.id, h.amount, row_number() OVER (PARTITION BY r.user ORDER BY r.id DESC) AS round
                FROM rows r JOIN users u ON u.number = r.user JOIN held h ON h.user = u.id
                WHERE r.part = 'history' AND u.role = 'target')
            WHERE round <= amount""")
        connection.execute(
            """UPDATE rows SET part = CASE WHEN id IN (SELECT id FROM newest WHERE number <= ?) THEN 'query'
            ELSE 'unused' END, reason = NULL WHERE id IN (SELECT id FROM newest)""",
            (most,),
        )
        set_meta(connection, "shared_items", "allow")
        connection.execute("""
            UPDATE users SET queries = (SELECT count(*) FROM rows WHERE user = number AND part = 'query')""")
        _recount(connection)


def keep_asking(source: Dataset, path: Path, asked: str) -> None:
    """Keep only history rows whose prompt asks for `asked`, that is, its last line without the colon.

    Raises:
        DataError: no history row asks for `asked`.
    """
    with _copy(source, path, f"asks for {asked}") as connection:
        connection.create_function("asks", 1, _asked, deterministic=True)
        connection.execute(
            """UPDATE rows SET part = 'unused', reason = ? WHERE part = 'history'
            AND (SELECT asks(t.prompt) FROM texts t WHERE t.id = rows.text) <> ?""",
            (ASKS_OTHERWISE, asked),
        )
        _recount(connection)
        if not connection.execute("SELECT sum(history) FROM users").fetchone()[0]:
            raise DataError(f"rows={asked}: no prompt of a history row ends with the line '{asked}:'")


def _asked(prompt: str) -> str:
    return prompt.rstrip().rsplit("\n", 1)[-1].rstrip(": ")


def _recount(connection: sqlite3.Connection) -> None:
    connection.execute("""
        UPDATE users SET history = (SELECT count(*) FROM rows WHERE user = number AND part = 'history')""")


def rewrite(
    source: Dataset, path: Path, name: str, rewritten: Iterable[Rewritten], max_length: int | None = None
) -> None:
    """Replace the prompts of rows but keep their keys, so that the leak check still works.

    `max_length` is the new longest row in tokens; that of `source` if None.
    """
    with _copy(source, path, name) as connection:
        connection.execute(SOURCES)
        cut = {"history": 0, "query": 0}
        for row in rewritten:
            text = connection.execute(
                "INSERT INTO texts(prompt, target, item) SELECT ?, t.target, t.item FROM texts t"
                " WHERE t.id = (SELECT text FROM rows WHERE id = ?) RETURNING id",
                (row.prompt, row.row),
            ).fetchone()[0]
            connection.execute("UPDATE rows SET text = ?, tokens = ? WHERE id = ?", (text, row.tokens, row.row))
            connection.executemany("INSERT INTO sources VALUES (?, ?)", [(row.row, other) for other in row.sources])
            if row.cut:
                part = connection.execute("SELECT part FROM rows WHERE id = ?", (row.row,)).fetchone()[0]
                cut[part] += 1
        connection.execute("DELETE FROM texts WHERE id NOT IN (SELECT text FROM rows)")
        set_meta(connection, "cut", cut)
        if max_length is not None:
            set_meta(connection, "max_length", max_length)


def cut_queries(dataset: Dataset) -> int:
    """Return the number of queries with a truncated prompt: cut to the model's length or in their prepended text."""
    longest = get_meta(dataset.connection, "max_length")
    long = dataset.connection.execute(
        "SELECT count(*) FROM rows WHERE part = 'query' AND tokens > ?", (longest,)
    ).fetchone()[0]
    return max(int(long), int((get_meta(dataset.connection, "cut") or {}).get("query", 0)))
