"""Summary of prepared data: users, rows, lengths, labels, the split, and the number of leaks.

All figures are measured on the database itself, independently of the code that made the split.
"""

from __future__ import annotations

import sqlite3
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Any

from proper.data.checks import leaking_rows
from proper.data.database import get_meta
from proper.data.dataset import Dataset
from proper.data.one_task import one_task


@dataclass(frozen=True)
class DataSummary:
    """Figures that `proper check` prints. `unused` counts rows by reason; `history` is (min, median, max) over targets.

    `tasks` has (target users, history rows, queries) by name, for data of several tasks; `labels` are the first one's.

    `cutoff` is the date of `split.by: time-global`, and `times` the first and the last time of all rows, in epoch
    seconds; None where there is none.
    """

    path: str
    users: int
    targets: int
    others: int
    one_item_users: int
    dropped_targets: int
    rows: int
    history_rows: int
    history_tokens: int
    history: tuple[int, float, int]
    queries: int
    unused: dict[str, int]
    duplicates: int
    bad_rows: int
    first_bad_rows: list[str]
    times: tuple[float, float] | None
    untimed_users: int
    labels: list[str]
    unseen_labels: list[str]
    unseen_label_queries: int
    max_length: int
    truncated: int
    leaks: int
    split_by: str
    cutoff: float | None
    shared_items: str
    evaluated_on: str
    sha256: str
    tasks: dict[str, tuple[int, int, int]]

    @property
    def truncated_share(self) -> float:
        """Share of rows longer than `max_length` tokens."""
        return self.truncated / self.rows

    def lines(self) -> list[str]:
        """Format the summary as lines for a terminal, with a heading in the first column."""
        low, median, high = self.history
        table = [
            ("data", f"{self.path} (sha256 {self.sha256[:12]})"),
            ("rows", f"{self.rows:,} ({self.duplicates:,} duplicates dropped)"),
            ("bad rows", f"{self.bad_rows:,}{' skipped' * (self.bad_rows > 0)}"),
            *(("", message) for message in self.first_bad_rows[:3]),
            ("users", f"{self.users:,}: {self.targets:,} targets, {self.others:,} others"),
            *self._special_users(),
            *([("times", " to ".join(map(_moment, self.times)))] if self.times is not None else []),
            ("split", f"by {self.split_by}{self._date()}; shared items: {self.shared_items}"),
            ("history", f"{self.history_rows:,} rows, {self.history_tokens:,} tokens"),
            ("", f"a target has {low:,} to {high:,} rows, median {median:g}"),
            *(
                ("task", f"{name}: {targets:,} targets, {history:,} history rows, {queries:,} queries")
                for name, (targets, history, queries) in self.tasks.items()
            ),
            ("queries", f"{self.queries:,}{' (of the validation part)' * (self.evaluated_on == 'validation')}"),
            *(("unused", f"{count:,}: {reason}") for reason, count in self.unused.items()),
            *self._about_labels(),
            ("too long", f"{self.truncated:,} rows ({self.truncated_share:.1%}) beyond {self.max_length} tokens"),
            ("leaks", f"{self.leaks:,}"),
        ]
        return [f"{heading:<10}{text}" for heading, text in table]

    def _date(self) -> str:
        return "" if self.cutoff is None else f" at {_moment(self.cutoff)}"

    def _special_users(self) -> Iterator[tuple[str, str]]:
        if self.one_item_users:
            yield "", f"{self.one_item_users:,} with one row only"
        if self.untimed_users:
            yield "", f"{self.untimed_users:,} with rows without time, in seeded order"
        if self.dropped_targets:
            yield "", f"{self.dropped_targets:,} no longer targets: all their history is shared with queries"

    def _about_labels(self) -> Iterator[tuple[str, str]]:
        if not self.labels:
            return
        yield "labels", f"{len(self.labels):,}: {_some(self.labels)}"
        alike = _alike(self.labels)
        if alike:
            yield "", f"different in capitals only: {_some([' and '.join(names) for names in alike], 4)}"
        if self.unseen_labels:
            unseen = f"{len(self.unseen_labels):,} not in any history: {_some(self.unseen_labels)}"
            yield "", f"{unseen} ({self.unseen_label_queries:,} queries ask for them)"


def _moment(seconds: float) -> str:
    # Added to the epoch: `fromtimestamp` refuses years that some systems do not support.
    date = datetime(1970, 1, 1, tzinfo=UTC) + timedelta(seconds=seconds)
    return date.isoformat(" ", "minutes").removesuffix("+00:00").removesuffix(" 00:00")


def truncation(dataset: Dataset) -> str | None:
    """Return a sentence on the rows that are cut to `compute.max_length`; None if they are less than 1 %."""
    cut, rows = _truncated(dataset.connection), dataset.connection.execute("SELECT count(*) FROM rows").fetchone()[0]
    if 100 * cut < rows:
        return None
    limit = get_meta(dataset.connection, "max_length")
    return f"{cut:,} of {rows:,} rows ({cut / rows:.0%}) have more tokens than compute.max_length, {limit}, and are cut"


def untimed(dataset: Dataset) -> str | None:
    """Return a sentence on the users whose newest rows are not known, if these should be the queries; else None."""
    if get_meta(dataset.connection, "split_by") != "time":
        return None
    users, some = dataset.connection.execute("SELECT count(*), sum(NOT timed) FROM users").fetchone()
    if not some:
        return None
    return f"{some:,} of {users:,} users have rows without a time (data.time): their queries are random, not the newest"


def _truncated(connection: sqlite3.Connection) -> int:
    limit = get_meta(connection, "max_length")
    return int(connection.execute("SELECT count(*) FROM rows WHERE tokens > ?", [limit]).fetchone()[0])


def _alike(labels: list[str]) -> list[list[str]]:
    """Return the labels that are equal but for capitals, together; often they are meant as one."""
    found: dict[str, list[str]] = {}
    for label in labels:
        found.setdefault(label.casefold(), []).append(label)
    return [names for names in found.values() if len(names) > 1]


def _some(names: list[str], limit: int = 12) -> str:
    return ", ".join(names[:limit]) + (", ..." if len(names) > limit else "")


def summarize(dataset: Dataset) -> DataSummary:
    """Compute the summary of prepared data."""
    connection, labels = dataset.connection, dataset.labels

    def one(query: str, *values: Any) -> Any:
        return connection.execute(query, values).fetchone()[0]

    max_length = get_meta(connection, "max_length")
    bad = get_meta(connection, "bad_rows")
    # With several tasks, the labels are the first one's.
    with one_task(dataset, dataset.tasks[0] if dataset.tasks else "") as first:
        unseen = _unseen_labels(first.connection, labels)
    return DataSummary(
        path=get_meta(connection, "path"),
        users=one("SELECT count(*) FROM users"),
        targets=one("SELECT count(*) FROM users WHERE role = 'target'"),
        others=one("SELECT count(*) FROM users WHERE role = 'other'"),
        one_item_users=one("SELECT count(*) FROM (SELECT user FROM rows GROUP BY user HAVING count(*) = 1)"),
        dropped_targets=get_meta(connection, "dropped_targets") or 0,
        rows=one("SELECT count(*) FROM rows"),
        history_rows=one("SELECT count(*) FROM rows WHERE part = 'history'"),
        history_tokens=one("SELECT coalesce(sum(tokens), 0) FROM rows WHERE part = 'history'"),
        history=_history(connection),
        queries=one("SELECT count(*) FROM rows WHERE part = 'query'"),
        unused=dict(connection.execute("SELECT reason, count(*) FROM rows WHERE part = 'unused' GROUP BY reason")),
        duplicates=get_meta(connection, "duplicates"),
        bad_rows=bad["count"],
        first_bad_rows=bad["first"],
        times=connection.execute("SELECT min(time), max(time) FROM rows HAVING min(time) NOTNULL").fetchone(),
        untimed_users=one("SELECT count(*) FROM users WHERE NOT timed"),
        labels=labels,
        unseen_labels=[label for label, _ in unseen],
        unseen_label_queries=sum(queries for _, queries in unseen),
        max_length=max_length,
        truncated=_truncated(connection),
        leaks=leaking_rows(connection),
        split_by=get_meta(connection, "split_by"),
        cutoff=get_meta(connection, "cutoff"),
        shared_items=get_meta(connection, "shared_items"),
        evaluated_on=get_meta(connection, "evaluate_on"),
        sha256=get_meta(connection, "sha256"),
        tasks={name: _sizes(dataset, name) for name in dataset.tasks},
    )


def _sizes(dataset: Dataset, task: str) -> tuple[int, int, int]:
    with one_task(dataset, task) as own:
        users = list(own.users("target"))
    return len(users), sum(user.history for user in users), sum(user.queries for user in users)


def _history(connection: sqlite3.Connection) -> tuple[int, float, int]:
    """Return minimum, median and maximum history length of the targets, in rows."""
    sizes = "SELECT history FROM users WHERE role = 'target'"
    count, low, high = connection.execute(f"SELECT count(*), min(history), max(history) FROM ({sizes})").fetchone()
    middle = f"{sizes} ORDER BY history LIMIT {2 - count % 2} OFFSET {(count - 1) // 2}"
    median = connection.execute(f"SELECT avg(history) FROM ({middle})").fetchone()[0]
    return int(low), float(median), int(high)


def _unseen_labels(connection: sqlite3.Connection, labels: list[str]) -> list[tuple[str, int]]:
    """List the labels that no history row has, each with the number of queries with that label."""
    if not labels:
        return []
    counts = connection.execute("""
        SELECT t.target, sum(r.part = 'history'), sum(r.part = 'query')
        FROM rows r CROSS JOIN texts t ON t.id = r.text GROUP BY t.target""")
    by_label = {label: (history, queries) for label, history, queries in counts}
    return [(label, by_label.get(label, (0, 0))[1]) for label in labels if not by_label.get(label, (0, 0))[0]]
