"""Prepared dataset of a run: one SQLite file with histories and queries, written once and then read-only.

Training samples are all history rows or a token budget, spread evenly over users or rows, in seeded order. Order and
choice come from hashes inside SQL, so only ids are sorted and rows stream: memory does not grow with their number. The
token count comes in as a callable.
"""

from __future__ import annotations

import logging
import sqlite3
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import count
from pathlib import Path

from proper.config import Config
from proper.data.database import VERSION, create, get_meta, open_read_only, salt, set_meta
from proper.data.histories import CountTokens, Role, SampledBy, TextExample, User, UserSet
from proper.data.ingest import ingest
from proper.data.item_evidence import fill_item_evidence
from proper.data.splits import assign
from proper.errors import DataError, ProperError
from proper.files import atomic_path

logger = logging.getLogger(__name__)

GIVEN = "the files"
"""Value of `split_by` when the data files define the split."""

_CHUNK = 1000

_EXAMPLES = """
    SELECT r.id, u.id, t.prompt, t.target, t.item, r.time, r.tokens{task}
    FROM rows r CROSS JOIN users u ON u.number = r.user CROSS JOIN texts t ON t.id = r.text"""


@dataclass(frozen=True)
class Sample:
    """`size` history rows with `tokens` tokens in all; a row counts at most the model's maximum length."""

    connection: sqlite3.Connection
    table: str
    seed: int
    size: int
    tokens: int

    def rows(self, epoch: int) -> Iterator[TextExample]:
        """Yield every row once, in an order that depends only on the sample's seed and `epoch`."""
        ordered = self.connection.execute(
            f"""SELECT s.id FROM {self.table} s CROSS JOIN rows r ON r.id = s.id
            ORDER BY scramble(r.digest, ?), s.id""",
            (salt("epoch", self.seed, epoch),),
        )
        while ids := [identity for (identity,) in ordered.fetchmany(_CHUNK)]:
            marks = ", ".join("?" * len(ids))
            chosen = self.connection.execute(f"{_examples(self.connection)} WHERE r.id IN ({marks})", ids)
            found = {row[0]: row for row in chosen}
            for identity in ids:
                yield TextExample(*found[identity])


def prepare(
    config: Config,
    path: Path,
    count_tokens: CountTokens,
    *,
    skip_bad_rows: bool = False,
    progress: Callable[[int], None] | None = None,
    is_left_out: Callable[[str], bool] | None = None,
) -> Dataset:
    """Read, validate and split the interactions of `config` into the database `path`, which is replaced atomically.

    `count_tokens` maps prompts and targets to their lengths in tokens, prompt and target together, untruncated.
    `progress` is called with the number of good rows read since its last call. Rows of users for whom `is_left_out`
    returns true are skipped: those users were deleted from the run. So are those of the users in `data.train_without`.

    Raises:
        DataError: the data cannot be read, has bad rows (without `skip_bad_rows`), or leaves nothing to evaluate.
        ProperError: `path` cannot be written.
    """
    files = {one.data.train_without for one in config.each_task.values()}
    without, met = frozenset().union(*map(left_out_users, files)), set[str]()

    def skips(user: str) -> bool:
        met.update({user} & without)
        return user in without or (is_left_out is not None and is_left_out(user))

    with atomic_path(path) as temporary:
        connection = create(temporary)
        try:
            connection.execute("BEGIN")
            ingest(connection, config, count_tokens, skip_bad_rows, progress, skips if without else is_left_out)
            _split(connection, config)
            fill_item_evidence(connection, config, count_tokens)
            connection.execute("COMMIT")
        except sqlite3.Error as error:
            raise ProperError(f"{path}: cannot be written: {error}") from error
        finally:
            connection.close()
        # A journal of a killed change to the former file: SQLite would roll it back into the new one.
        path.with_name(f"{path.name}-journal").unlink(missing_ok=True)
    named, found = ({name.strip() for name in names} for names in (without, met))
    if named != found:
        logger.warning(f"data.train_without: {len(named - found)} of its {len(named)} users have no rows in the data")
    return Dataset.open(path)


def left_out_users(path: str | None, named_by: str = "data.train_without") -> frozenset[str]:
    """Return the user ids of a file with one a line, as `data.train_without` names it; none without a file.

    Raises:
        DataError: the file cannot be read; names the key or option that it is `named_by`.
    """
    if path is None:
        return frozenset()
    try:
        text = Path(path).read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        why = error.strerror if isinstance(error, OSError) else "it is not UTF-8"
        raise DataError(f"{named_by}: {path}: cannot be read: {why}") from error
    lines = text.split("\n")
    return frozenset(name for line in lines for name in (line.strip(), line.rstrip("\r")) if name)


def _split(connection: sqlite3.Connection, config: Config) -> None:
    """Assign every row to history, query or unused, and store the settings that later steps read."""
    shared, given = config.split.shared_items, config.data.given_split
    if shared == "auto":
        writes = any(one.task.kind == "generation" for one in config.each_task.values())
        shared = "exclude" if writes else "allow"
    assign(connection, config.split, exclude=shared == "exclude", given=given)
    for key, value in {
        "version": VERSION,
        "path": config.data.path,
        "split_by": GIVEN if given else config.split.by,
        "shared_items": shared,
        "evaluate_on": config.split.evaluate_on,
        "max_length": config.compute.max_length,
    }.items():
        set_meta(connection, key, value)


class Dataset:
    """Prepared data, read-only.

    Attributes:
        sha256: hash of the good rows' content and of the settings that map and split them.
        labels: the label set, sorted (ratings as numbers); empty for generation. With several tasks, the first one's.
        tasks: the names of several tasks; empty for data of one.
        given_split: whether the files name the queries, as benchmark files do.
        connection: the read-only database, for measures that this class does not provide.
    """

    def __init__(self, connection: sqlite3.Connection) -> None:
        self.connection = connection
        self.sha256: str = get_meta(connection, "sha256")
        self.labels: list[str] = get_meta(connection, "labels")
        self.tasks: tuple[str, ...] = tuple(get_meta(connection, "tasks") or ())
        self._examples = _examples(connection)
        self.given_split: bool = get_meta(connection, "split_by") == GIVEN
        self._tables = count()

    @classmethod
    def open(cls, path: Path) -> Dataset:
        """Open a database that `prepare` wrote.

        Raises:
            RunFolderError: the file is missing or not readable.
        """
        return cls(open_read_only(path))

    def close(self) -> None:
        """Close the database; open iterators end with it."""
        self.connection.close()

    def __enter__(self) -> Dataset:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def users(self, role: Role | None = None) -> Iterator[User]:
        """Yield users by descending history length, ties by id."""
        found = self.connection.execute(
            """SELECT id, role, history, queries FROM users WHERE ?1 IS NULL OR role = ?1
            ORDER BY history DESC, number""",
            (role,),
        )
        return (User(*row) for row in found)

    def user(self, user: str) -> User | None:
        """Return one user, or None for an unknown id."""
        found = self.connection.execute("SELECT id, role, history, queries FROM users WHERE id = ?", (user,)).fetchone()
        return User(*found) if found else None

    def history(self, user: str, newest: int | None = None) -> list[TextExample]:
        """List a user's history, oldest first (rows without time before all others); only the `newest` n if given."""
        found = self.connection.execute(
            f"""{self._examples} WHERE r.id IN (
                SELECT r.id FROM rows r WHERE r.user = (SELECT number FROM users WHERE id = ?) AND r.part = 'history'
                ORDER BY r.id DESC LIMIT ?) ORDER BY r.id""",
            (user, -1 if newest is None else newest),
        )
        return [TextExample(*row) for row in found]

    def queries(self, user: str | None = None) -> Iterator[TextExample]:
        """Yield the held-out queries of all target users, or of one user, ordered by user and then by time."""
        if user is None:
            found = self.connection.execute(f"{self._examples} WHERE r.part = 'query' ORDER BY r.id")
        else:
            found = self.connection.execute(
                f"""{self._examples} WHERE r.user = (SELECT number FROM users WHERE id = ?) AND r.part = 'query'
                ORDER BY r.id""",
                (user,),
            )
        return (TextExample(*row) for row in found)

    def sample(self, users: UserSet, max_tokens: int | None, seed: int, by: SampledBy = "users") -> Sample:
        """Sample history rows of `users` for training, at most `max_tokens` tokens.

        By `users`, the tokens are spread evenly over users; by `rows`, every row is drawn with the same probability.
        """
        table = f"sample_{next(self._tables)}"
        return _draw(self.connection, users, max_tokens, seed, by, get_meta(self.connection, "max_length"), table)


def _examples(connection: sqlite3.Connection) -> str:
    """Return the statement that reads interactions; only files of several tasks have the column `task`."""
    return _EXAMPLES.format(task=", r.task" if get_meta(connection, "tasks") else "")


def _draw(
    connection: sqlite3.Connection,
    users: UserSet,
    max_tokens: int | None,
    seed: int,
    by: SampledBy,
    max_length: int,
    table: str,
) -> Sample:
    """Sample history rows of `users` into the new temporary table `table`.

    With `max_tokens`, rows are taken until the next one would exceed the budget; at least one row is taken. By `users`,
    they are taken in rounds of one row per user, users in random order in each round; by `rows`, in random order.
    """
    order = "round, scramble(name || ' ' || round, :salt)" if by == "users" else "scramble(digest, :salt)"
    roles = {"all": "('target', 'other')", "others": "('other')", "targets": "('target')"}[users]
    history = f"""
        FROM rows r JOIN users u ON u.number = r.user WHERE r.part = 'history' AND u.role IN {roles}"""
    connection.execute(f"CREATE TEMP TABLE {table}(id INTEGER PRIMARY KEY, tokens INTEGER)")
    if max_tokens is None:
        connection.execute(f"INSERT INTO {table} SELECT r.id, min(r.tokens, {max_length}) {history} ORDER BY r.id")
    else:
        connection.execute(
            f"""
            INSERT INTO {table}
            SELECT id, tokens FROM (
                SELECT id, tokens, sum(tokens) OVER spent AS used, row_number() OVER spent AS number FROM (
                    SELECT r.id, min(r.tokens, {max_length}) AS tokens, u.id AS name, r.digest,
                           row_number() OVER (PARTITION BY r.user ORDER BY scramble(r.digest, :salt), r.id) AS round
                    {history})
                WINDOW spent AS (ORDER BY {order}, id
                                 ROWS UNBOUNDED PRECEDING))
            WHERE used <= :budget OR number = 1 ORDER BY id""",
            {"salt": salt("sample", seed), "budget": max_tokens},
        )
    size, tokens = connection.execute(f"SELECT count(*), coalesce(sum(tokens), 0) FROM {table}").fetchone()
    return Sample(connection, table, seed, size, tokens)
