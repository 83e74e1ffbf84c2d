"""Ingestion of interactions into the database: chunked, deduplicated, in an order independent of the files' order."""

from __future__ import annotations

import hashlib
import json
import logging
import sqlite3
import unicodedata
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import replace
from hashlib import blake2b
from itertools import islice

from proper.config import Config
from proper.data.database import set_meta, text_key
from proper.data.histories import CountTokens
from proper.data.interactions import BadRows, Interaction, read_interactions
from proper.data.task_rows import task_rows
from proper.data.values import respelled
from proper.errors import DataError

logger = logging.getLogger(__name__)

_CHUNK = 1000
# Bounds the memory of a chunk when texts are long.
_CHUNK_CHARACTERS = 4_000_000
_RESPELLED = 100


def normalize(prompt: str) -> str:
    """Return the canonical form of an input: composed, case-folded, with runs of white space as one space."""
    return " ".join(unicodedata.normalize("NFC", prompt).casefold().split())


def ingest(
    connection: sqlite3.Connection,
    config: Config,
    count_tokens: CountTokens,
    skip_bad_rows: bool,
    progress: Callable[[int], None] | None,
    is_left_out: Callable[[str], bool] | None = None,
) -> None:
    """Fill the tables with the good rows of `config.data` and store labels, counts and hash.

    Every row gets part "history", except queries that the files name.

    Raises:
        DataError: there are bad rows and `skip_bad_rows` is off, no good rows, or fewer than two labels.
    """
    connection.execute("""
        CREATE TEMP TABLE arrived(text INTEGER PRIMARY KEY, user TEXT, time REAL, digest BLOB, item TEXT,
                                  item_key INTEGER, prompt_key INTEGER, tokens INTEGER, part TEXT, task INTEGER)""")
    bad, count = _load(connection, config, count_tokens, skip_bad_rows, progress, is_left_out)
    alone = config.each_task
    _require_rows(connection, alone, bad)
    for at, one in enumerate(alone.values()):
        if one.task.kind != "generation" and one.task.labels == "auto":
            _respell(connection, at, one.task.kind, count_tokens)
    _settle(connection)
    if config.tasks:
        connection.execute("ALTER TABLE rows ADD COLUMN task INTEGER NOT NULL DEFAULT 0")
        connection.execute("UPDATE rows SET task = (SELECT a.task FROM arrived a WHERE a.text = rows.text)")
    labels = {
        name: _labels(connection, one, at, f"tasks.{name}." * bool(name))
        for at, (name, one) in enumerate(alone.items())
    }
    rows = connection.execute("SELECT count(*) FROM rows").fetchone()[0]
    set_meta(connection, "bad_rows", {"count": bad.count, "first": bad.first})
    set_meta(connection, "duplicates", count - rows)
    set_meta(connection, "labels", next(iter(labels.values())))
    if config.tasks:
        set_meta(connection, "tasks", labels)
    set_meta(connection, "sha256", _sha256(connection, config))
    connection.execute("DROP TABLE arrived")


def _load(
    connection: sqlite3.Connection,
    config: Config,
    count_tokens: CountTokens,
    skip_bad_rows: bool,
    progress: Callable[[int], None] | None,
    is_left_out: Callable[[str], bool] | None,
) -> tuple[BadRows, int]:
    """Insert the good rows as they are read; return the bad rows and the number of good ones."""
    bad, count, all_bad = BadRows(), 0, True

    def kept() -> Iterator[Interaction]:
        nonlocal all_bad
        for each in _all_tasks(config, bad):
            all_bad = False
            if is_left_out is None or not is_left_out(each.user):
                yield each

    for chunk in _chunks(kept()):
        if bad.count and not skip_bad_rows:
            continue  # Nothing is kept; the rest is read only to count the bad rows.
        tokens = count_tokens([each.prompt for each in chunk], [each.target for each in chunk])
        _insert(connection, chunk, tokens, count)
        count += len(chunk)
        if progress is not None:
            progress(len(chunk))
    if bad.count and not skip_bad_rows:
        raise DataError(bad.message(all_bad=all_bad))
    if not count:
        gone = "every user was deleted or is in data.train_without"
        why = f"the first of {bad.count:,} bad rows: {bad.first[0]}" if bad.count else gone
        raise DataError(f"{config.data.path}: not one good row; {why}")
    return bad, count


def _require_rows(connection: sqlite3.Connection, tasks: Mapping[str, Config], bad: BadRows) -> None:
    """Raise DataError if all rows of one of several tasks were left out."""
    for at, (name, one) in enumerate(tasks.items()):
        if not connection.execute("SELECT 1 FROM arrived WHERE task = ? LIMIT 1", (at,)).fetchone():
            why = f"the first of {bad.count:,} bad rows: {bad.first[0]}" if bad.count else "its users are left out"
            raise DataError(f"{one.data.path}: not one good row of the task {name!r}; {why}")


def _all_tasks(config: Config, bad: BadRows) -> Iterator[Interaction]:
    """Yield the good rows of every task, one task after the other.

    Raises:
        DataError: see `read_interactions`; a task has no row of its own in its file.
    """
    own = task_rows(config)
    for at, (name, one) in enumerate(config.each_task.items()):
        rows = read_interactions(one.data, bad, one.task, own[name])
        if not config.tasks:
            yield from rows
            continue
        row = None
        for row in rows:
            yield replace(row, task=at)
        if row is None and not bad.count:
            raise DataError(f"{one.data.path}: no row of the task {name!r} (data.task_column: {one.data.task_column})")
        warning = own[name].warning(one.data.path)
        if warning is not None:
            logger.warning(warning)


def _chunks(interactions: Iterable[Interaction]) -> Iterator[list[Interaction]]:
    chunk: list[Interaction] = []
    characters = 0
    for each in interactions:
        chunk.append(each)
        characters += len(each.prompt) + len(each.target)
        if len(chunk) == _CHUNK or characters >= _CHUNK_CHARACTERS:
            yield chunk
            chunk, characters = [], 0
    if chunk:
        yield chunk


def _insert(connection: sqlite3.Connection, chunk: list[Interaction], tokens: list[int], before: int) -> None:
    texts, narrow = [], []
    for number, (each, length) in enumerate(zip(chunk, tokens, strict=True), before + 1):
        texts.append((number, each.prompt, each.target, each.item))
        item_key = None if each.item is None else text_key(each.item)
        key = text_key(normalize(each.prompt))
        part = "query" if each.query else "history"
        narrow.append((number, each.user, each.time, _digest(each), each.item, item_key, key, length, part, each.task))
    connection.executemany("INSERT INTO texts VALUES (?, ?, ?, ?)", texts)
    connection.executemany("INSERT INTO arrived VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?)", narrow)


def _digest(each: Interaction) -> bytes:
    """Hash the fields that define a duplicate: user, prompt, target and time, but not the item.

    For a query that the files name, the item id counts too, because every query id must be answered; and so does the
    number of the row's task.
    """
    own: list[object] = [*([each.item] if each.query else []), *([each.task] if each.task else [])]
    content = json.dumps([each.user, each.prompt, each.target, each.time, *own])
    return blake2b(content.encode(), digest_size=16).digest()


def _respell(connection: sqlite3.Connection, task: int, kind: str, count_tokens: CountTokens) -> None:
    """Rewrite a task's targets that spell one label differently to one spelling; recompute digests and lengths."""
    found_targets = connection.execute(
        "SELECT DISTINCT t.target FROM texts t JOIN arrived a ON a.text = t.id WHERE a.task = ?", (task,)
    )
    targets = [target for (target,) in found_targets]
    connection.execute("CREATE TEMP TABLE respelled(old TEXT PRIMARY KEY, new TEXT)")
    connection.executemany("INSERT INTO respelled VALUES (?, ?)", respelled(targets, kind).items())
    last = 0
    while rows := connection.execute(
        """SELECT t.id, a.user, t.prompt, s.new, t.item, a.time, a.part = 'query', a.task
        FROM arrived a CROSS JOIN texts t ON t.id = a.text CROSS JOIN respelled s ON s.old = t.target
        WHERE a.text > ? AND a.task = ? ORDER BY a.text LIMIT ?""",
        (last, task, _RESPELLED),
    ).fetchall():
        found = [Interaction(*row) for _, *row in rows]
        tokens = count_tokens([each.prompt for each in found], [each.target for each in found])
        numbers = [number for number, *_ in rows]
        connection.executemany(
            "UPDATE texts SET target = ? WHERE id = ?", zip((each.target for each in found), numbers, strict=True)
        )
        connection.executemany(
            "UPDATE arrived SET digest = ?, tokens = ? WHERE text = ?",
            zip(map(_digest, found), tokens, numbers, strict=True),
        )
        last = numbers[-1]
    connection.execute("DROP TABLE respelled")


def _settle(connection: sqlite3.Connection) -> None:
    """Number users and rows by content; of duplicates, keep the row with the smallest item id."""
    connection.execute("INSERT INTO users(id) SELECT DISTINCT user FROM arrived ORDER BY user")
    # With a single min(), SQLite takes the other columns from the row that has the minimum.
    connection.execute("""
        INSERT INTO rows(text, user, time, tokens, digest, item_key, prompt_key, part)
        SELECT a.text, u.number, a.time, a.tokens, a.digest, a.item_key, a.prompt_key, a.part FROM (
            SELECT *, min(coalesce(item, '')) FROM arrived GROUP BY user, time, digest) a
        JOIN users u ON u.id = a.user ORDER BY u.number, a.time, a.digest""")
    connection.execute("DELETE FROM texts WHERE id NOT IN (SELECT text FROM rows)")
    connection.execute("CREATE INDEX rows_of_user ON rows(user, part)")
    connection.execute("""
        UPDATE users SET timed = NOT EXISTS (SELECT 1 FROM rows WHERE user = number AND time IS NULL)""")


def _labels(connection: sqlite3.Connection, config: Config, task: int, where: str) -> list[str]:
    """List a task's labels, ratings in numeric order; empty for generation."""
    if config.task.kind == "generation":
        return []
    if config.task.labels != "auto":
        return list(config.task.labels)
    found = connection.execute(
        "SELECT DISTINCT t.target FROM texts t JOIN arrived a ON a.text = t.id WHERE a.task = ? ORDER BY t.target",
        (task,),
    )
    labels = [label for (label,) in found]
    if len(labels) < 2:
        raise DataError(
            f"{where}data.target: every row has the answer {labels[0]!r}; task.kind {config.task.kind} needs two"
        )
    return sorted(labels, key=lambda label: (float(label), label)) if config.task.kind == "rating" else labels


def _sha256(connection: sqlite3.Connection, config: Config) -> str:
    """Hash the rows, independent of their order, and the settings that map and split them, without the paths."""
    digest = hashlib.sha256()
    settings = {
        "data": config.data.model_dump(include={"user", "time", "item", "prompt", "target"}),
        "task": config.task.model_dump(),
        "split": config.split.model_dump(),
    }
    if config.tasks:
        tasks = {name: one.model_dump() for name, one in config.tasks.items()}
        kept = ("user", "time", "item", "prompt", "target", "task_column")
        settings["tasks"] = {
            name: [{key: one["data"][key] for key in kept}, one["task"]] for name, one in tasks.items()
        }
    if config.data.given_split:
        settings["lamp"] = config.data.model_dump(include={"format", "task", "layout"})
    digest.update(json.dumps(settings, sort_keys=True).encode())
    rows = connection.execute("SELECT r.digest, t.item FROM rows r CROSS JOIN texts t ON t.id = r.text ORDER BY r.id")
    while some := list(islice(rows, _CHUNK)):
        digest.update(json.dumps([(key.hex(), item) for key, item in some]).encode())
    return digest.hexdigest()
