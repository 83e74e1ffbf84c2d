"""Leaks and coverage of prepared data."""

from __future__ import annotations

import random
import sqlite3
from collections.abc import Callable
from pathlib import Path

import pytest

from proper.data.checks import leaks, queries_seen_by_others, targets_outside
from proper.data.dataset import Dataset
from proper.data.summary import summarize
from tests.data.text_rows import make_rows

Build = Callable[..., Dataset]
CHOICE = {"kind": "classification"}


@pytest.mark.parametrize(
    ("change", "what"),
    [
        (
            "UPDATE rows SET digest = (SELECT digest FROM rows WHERE part = 'query' AND id = 18) WHERE id = 1",
            "its own row",
        ),
        ("UPDATE rows SET item_key = (SELECT item_key FROM rows WHERE id = 18) WHERE id = 1", "its item"),
        ("UPDATE rows SET prompt_key = (SELECT prompt_key FROM rows WHERE id = 18) WHERE id = 1", "its input"),
    ],
)
def test_leaks_are_measured_and_not_believed(tmp_path: Path, build: Build, change: str, what: str) -> None:
    """A file that a wrong split could have written is caught."""
    assert leaks(build(make_rows({"a": 20}))) == []
    path = tmp_path / "data0.sqlite"
    connection = sqlite3.connect(path)
    connection.execute(change)
    connection.commit()
    connection.close()
    with Dataset.open(path) as dataset:
        assert leaks(dataset) == [f"query 18 of user 'a': {what} is in training"]
        assert summarize(dataset).leaks == 1
        assert summarize(dataset).lines()[-1] == "leaks     1"


def test_shared_items_are_no_leak_where_they_are_allowed(build: Build) -> None:
    rows = [row | {"item_id": "same", "input": "same"} for row in make_rows({"a": 20})]
    dataset = build(rows, task=CHOICE)
    assert leaks(dataset) == []
    assert summarize(dataset).leaks == 0


def test_seen_by_others_is_by_item_else_by_input(build) -> None:
    rows = [
        {"user_id": user, "timestamp": at, "input": f"{user} {at}", "output": "yes", "item_id": f"{user}{at}"}
        for user in ("a", "b")
        for at in range(12)
    ]
    rows[11]["item_id"] = "b1"  # a's query, an item in b's history
    rows[23]["item_id"] = "b2"  # b's query, an item in b's own history only
    dataset = build(rows, split={"shared_items": "allow", "queries": 0.05})
    queries = {query.user: query.id for query in dataset.queries()}
    assert queries_seen_by_others(dataset) == {queries["a"]}
    for row in rows:
        del row["item_id"]
    rows[11]["input"], rows[23]["input"] = "B  3", "b 2"
    dataset = build(rows, split={"shared_items": "allow", "queries": 0.05})
    queries = {query.user: query.id for query in dataset.queries()}
    assert queries_seen_by_others(dataset) == {queries["a"]}


def test_users_outside_a_sample(build) -> None:
    rows = [
        {"user_id": user, "timestamp": at, "input": f"{user} {at}", "output": "yes"}
        for user in ("a", "b", "c")
        for at in range(15)
    ]
    dataset = build(rows)
    assert targets_outside(dataset, dataset.sample("all", None, 0)) == set()
    sample = dataset.sample("all", 1, 0)
    (drawn,) = {row.user for row in sample.rows(0)}
    assert targets_outside(dataset, sample) == {"a", "b", "c"} - {drawn}


@pytest.mark.parametrize("seed", range(4))
def test_seen_by_others_is_what_a_comparison_of_all_pairs_finds(build: Build, seed: int) -> None:
    draw = random.Random(seed)
    rows = [
        {"user_id": user, "timestamp": at, "input": f"ask {draw.randint(0, 60)}", "output": "yes"}
        | ({"item_id": str(draw.randint(0, 90))} if draw.random() < 0.6 else {"item_id": None})
        for user in "abcde"
        for at in range(24)
    ]
    dataset = build(rows, split={"shared_items": "allow", "queries": 0.3})
    found = dataset.connection.execute("SELECT id, user, part, item_key, prompt_key FROM rows").fetchall()
    expected = {
        number
        for number, user, part, item, prompt in found
        if part == "query"
        for _, other, its_part, its_item, its_prompt in found
        if its_part == "history" and other != user and (prompt == its_prompt if item is None else item == its_item)
    }
    assert expected
    assert queries_seen_by_others(dataset) == expected
