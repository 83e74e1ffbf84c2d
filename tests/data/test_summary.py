"""Figures, leaks and coverage of prepared data."""

from __future__ import annotations

import random
import sqlite3
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from proper.data.dataset import Dataset
from proper.data.summary import leaks, queries_seen_by_others, summarize, targets_outside, truncation, untimed

Build = Callable[..., Dataset]
CHOICE = {"kind": "classification"}


def make_rows(lengths: dict[str, int]) -> list[dict[str, Any]]:
    return [
        {"user_id": user, "input": f"{user} {n}", "output": f"answer{n % 4}", "timestamp": n, "item_id": f"{user}{n}"}
        for user, length in lengths.items()
        for n in range(length)
    ]


def test_everything_is_counted(build: Build) -> None:
    rows = make_rows({"a": 20, "b": 15, "c": 40, "one": 1, "two": 1})
    rows[19]["input"] += " word" * 300
    dataset = build([*rows, rows[0], {}], task=CHOICE, skip_bad_rows=True)
    summary = summarize(dataset)
    assert (summary.users, summary.targets, summary.others, summary.one_item_users) == (5, 3, 2, 2)
    assert (summary.rows, summary.duplicates, summary.bad_rows) == (77, 1, 1)
    assert summary.history == (12, 16.0, 32)
    assert (summary.history_rows, summary.queries, summary.unused) == (62, 15, {})
    assert summary.history_tokens == 62 * 3
    assert (summary.truncated, summary.truncated_share) == (1, 1 / 77)
    assert (summary.leaks, summary.shared_items) == (0, "allow")
    assert summary.sha256 == dataset.sha256


def test_rows_that_are_cut_are_named_from_one_in_a_hundred(build: Build) -> None:
    rows = make_rows({"a": 20, "b": 15, "c": 65})
    rows[19]["input"] += " word" * 300
    assert truncation(build(rows)) == "1 of 100 rows (1%) have more tokens than compute.max_length, 256, and are cut"
    assert truncation(build([*rows, *make_rows({"d": 1})])) is None


def test_the_median_of_an_even_number_of_targets_lies_between(build: Build) -> None:
    assert summarize(build(make_rows({"a": 20, "b": 15}))).history == (12, 14.0, 16)


def test_labels_that_no_history_has_are_listed(build: Build) -> None:
    rows = make_rows({"a": 20})
    rows[19]["output"] = rows[18]["output"] = "new"
    summary = summarize(build(rows, task=CHOICE))
    assert (summary.unseen_labels, summary.unseen_label_queries) == (["new"], 2)
    configured = ["answer0", "answer1", "answer2", "answer3", "new", "never"]
    summary = summarize(build(rows, task=CHOICE | {"labels": configured}))
    assert (summary.unseen_labels, summary.unseen_label_queries) == (["new", "never"], 2)
    assert ["2", "not", "in", "any", "history:", "new,", "never", "(2", "queries", "ask", "for", "them)"] in [
        line.split() for line in summary.lines()
    ]


def test_labels_that_differ_in_capitals_are_listed(build: Build) -> None:
    rows = [row | {"output": ["Bug", "bug", "ok"][at % 3]} for at, row in enumerate(make_rows({"a": 20}))]
    assert "          different in capitals only: Bug and bug" in summarize(build(rows, task=CHOICE)).lines()


def test_lines_are_a_small_table(build: Build) -> None:
    dataset = build([*make_rows({"a": 20, "one": 1}), {}], skip_bad_rows=True)
    summary = summarize(dataset)
    lines = summary.lines()
    assert lines == [
        f"data      {summary.path} (sha256 {summary.sha256[:12]})",
        "rows      21 (0 duplicates dropped)",
        "bad rows  1 skipped",
        f"          {summary.path}:22: user_id: missing",
        "users     2: 1 targets, 1 others",
        "          1 with one row only",
        "times     1970-01-01 to 1970-01-01",
        "split     by time; shared items: exclude",
        "history   17 rows, 51 tokens",
        "          a target has 16 to 16 rows, median 16",
        "queries   4",
        "too long  0 rows (0.0%) beyond 256 tokens",
        "leaks     0",
    ]


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


def test_the_one_date_is_shown(build: Build) -> None:
    rows = [row | {"timestamp": f"2020-01-{row['timestamp'] + 1:02}"} for row in make_rows({"a": 20})]
    rows.append(rows[0] | {"timestamp": "0999-12-31 23:58", "input": "long ago"})
    lines = summarize(build(rows, split={"by": "time-global"})).lines()
    assert "times     0999-12-31 23:58 to 2020-01-20" in lines
    assert "split     by time-global at 2020-01-17; shared items: exclude" in lines


def test_without_times_there_are_none_to_show(build: Build) -> None:
    rows = [{key: value for key, value in row.items() if key != "timestamp"} for row in make_rows({"a": 20})]
    dataset = build([*rows, *make_rows({"b": 20})])
    assert untimed(dataset) == (
        "1 of 2 users have rows without a time (data.time): their queries are random, not the newest"
    )
    assert untimed(build(rows, split={"by": "random"})) is None
    assert untimed(build(make_rows({"a": 20}))) is None
    assert not [line for line in summarize(build(rows)).lines() if line.startswith("times")]


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
