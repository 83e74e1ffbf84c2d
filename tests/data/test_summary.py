"""Figures of prepared data."""

from __future__ import annotations

from collections.abc import Callable

from proper.data.dataset import Dataset
from proper.data.summary import summarize, truncation, untimed
from tests.data.text_rows import make_rows

Build = Callable[..., Dataset]
CHOICE = {"kind": "classification"}


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
