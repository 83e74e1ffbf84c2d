"""Data files that are made from other data sets, for questions that no single data set answers."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pyarrow.parquet as parquet

from proper.files import write_text

PAPERS = 12
"""Number of each ACL author's newest papers: fewer than any HuffPost author among the target users has articles."""


def make_data(made: str, sources: Sequence[Path], folder: Path) -> Path:
    """Write the data file named `made`, a key of `MADE`, unless it exists; return its path.

    Raises:
        ValueError: the name is unknown.
    """
    if made not in MADE:
        raise ValueError(f"no data is made by the name '{made}'")
    path = folder / f"{made}.jsonl"
    if not path.exists():
        rows = MADE[made](*(parquet.read_table(source).to_pylist() for source in sources))
        write_text(path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
    return path


def two_tasks(articles: Sequence[Mapping[str, Any]]) -> Iterable[dict[str, Any]]:
    """Return an article as two rows: its section asked for, and its headline."""
    for row in articles:
        prompt = f"Headline: {row['headline']}\nDescription: {row['description']}\nCategory:"
        yield {**_same(row), "input": prompt, "output": row["label"]}
        yield _headline(row)


def acl_and_headlines(
    papers: Sequence[Mapping[str, Any]], articles: Sequence[Mapping[str, Any]]
) -> Iterable[dict[str, Any]]:
    """Return ACL authors' newest papers, whose titles are asked for, and HuffPost's articles, by their headlines."""
    by_author: dict[str, list[Mapping[str, Any]]] = defaultdict(list)
    for row in papers:
        by_author[row["user_id"]].append(row)
    for author, rows in by_author.items():
        for row in sorted(rows, key=lambda row: (row["timestamp"], row["item_id"]))[-PAPERS:]:
            prompt = f"Abstract: {row['abstract']}\nTitle:"
            yield {**_same(row), "user_id": f"acl-{author}", "input": prompt, "output": row["title"]}
    for row in articles:
        yield {**_headline(row), "user_id": f"huffpost-{row['user_id']}"}


MADE: Mapping[str, Callable[..., Iterable[dict[str, Any]]]] = {
    "huffpost-two-tasks": two_tasks,
    "acl-and-headlines": acl_and_headlines,
}


def _headline(row: Mapping[str, Any]) -> dict[str, Any]:
    return {**_same(row), "input": f"Description: {row['description']}\nHeadline:", "output": row["headline"]}


def _same(row: Mapping[str, Any]) -> dict[str, Any]:
    return {key: row[key] for key in ("user_id", "timestamp", "item_id")}
