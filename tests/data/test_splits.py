from __future__ import annotations

import random
from collections import Counter, defaultdict
from collections.abc import Callable
from contextlib import AbstractContextManager
from math import ceil
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from proper.data.checks import leaks
from proper.data.dataset import Dataset
from proper.data.histories import TextExample
from proper.data.ingest import normalize
from proper.data.splits import AFTER_CUTOFF, BEYOND_BUDGET, HELD_OUT, NO_TIME, OTHERS_QUERY_ITEM, SHARED
from proper.data.summary import summarize
from proper.errors import DataError

Build = Callable[..., Dataset]
Row = dict[str, Any]
Prepared = Callable[[list[Row], dict[str, Any]], AbstractContextManager[Dataset | None]]

ROWS = st.lists(
    st.fixed_dictionaries(
        {
            "user_id": st.sampled_from("abcd"),
            "input": st.sampled_from(["one", "One ", "two", "three", "four", "five"]),
            "output": st.sampled_from(["x", "y", "z"]),
            "timestamp": st.sampled_from([1, 2, 3, 4, 5, 6, None]),
            "item_id": st.sampled_from(["i", "j", "k", "l", None]),
        }
    ),
    min_size=4,
    max_size=40,
)
SPLITS = st.fixed_dictionaries(
    {
        "by": st.sampled_from(["time", "time-global", "item", "random"]),
        "shared_items": st.sampled_from(["exclude", "allow"]),
        "queries": st.sampled_from([0.1, 0.2, 0.5]),
        "min_history": st.sampled_from([1, 2]),
        "target_users": st.sampled_from([1, 2, 100]),
        "max_queries": st.sampled_from([None, 1, 3]),
        "evaluate_on": st.sampled_from(["queries", "validation"]),
        "seed": st.integers(0, 3),
    }
)


def history(dataset: Dataset) -> list[TextExample]:
    return [row for user in dataset.users() for row in dataset.history(user.id)]


def content(row: TextExample) -> tuple[Any, ...]:
    return row.user, row.prompt, row.target, row.time


@settings(max_examples=150, deadline=None)
@given(rows=ROWS, split=SPLITS, chance=st.randoms(use_true_random=False))
def test_properties_of_every_rule(
    prepared: Prepared, rows: list[Row], split: dict[str, Any], chance: random.Random
) -> None:
    with prepared(rows, split) as dataset:
        if dataset is None:
            return
        trained, asked = history(dataset), list(dataset.queries())
        _check_parts(dataset, trained, asked, split)
        if split["shared_items"] == "exclude":
            assert not {row.item for row in asked} - {None} & {row.item for row in trained}
            assert not {normalize(row.prompt) for row in asked} & {normalize(row.prompt) for row in trained}
        if split["by"] == "time":
            _check_order_within_users(trained, asked, rows)
        if split["by"] == "time-global":
            assert max(row.time for row in trained) < min(row.time for row in asked)
        assert leaks(dataset) == []
        assert summarize(dataset).leaks == 0
        shuffled = rows + rows[:2]
        chance.shuffle(shuffled)
        with prepared(shuffled, split) as again:
            assert again is not None
            assert (history(again), list(again.queries())) == (trained, asked)
            assert again.sha256 == dataset.sha256


def _check_parts(dataset: Dataset, trained: list[TextExample], asked: list[TextExample], split: dict[str, Any]) -> None:
    targets = {user.id for user in dataset.users("target")}
    assert 1 <= len(targets) <= split["target_users"]
    assert {row.user for row in asked} <= targets
    assert not {content(row) for row in trained} & {content(row) for row in asked}
    assert targets <= {row.user for row in trained}
    if split["max_queries"]:
        assert len(asked) <= split["max_queries"]
    for user in dataset.users():
        assert user.history == len(dataset.history(user.id))
        assert user.queries == sum(row.user == user.id for row in asked)
    summary = summarize(dataset)
    assert summary.rows == summary.history_rows + summary.queries + sum(summary.unused.values())


def _check_order_within_users(trained: list[TextExample], asked: list[TextExample], rows: list[Row]) -> None:
    untimed = {row["user_id"] for row in rows if row["timestamp"] is None}
    for query in asked:
        if query.user not in untimed:
            assert all(row.time <= query.time for row in trained if row.user == query.user)


def make_rows(lengths: dict[str, int], **change: Any) -> list[Row]:
    """Rows 1..n of every user, later ones with later times, none sharing anything."""
    return [
        {"user_id": user, "input": f"{user} {n}", "output": f"answer {n}", "timestamp": n, "item_id": f"{user}{n}"}
        | change
        for user, length in lengths.items()
        for n in range(1, length + 1)
    ]


def prompts(rows: Any) -> list[str]:
    return [row.prompt for row in rows]


@pytest.mark.parametrize(("share", "n"), [(0.2, 10), (0.2, 11), (0.07, 100), (0.5, 7), (0.01, 20)])
def test_time_holds_out_the_newest_share_rounded_up(build: Build, share: float, n: int) -> None:
    dataset = build(make_rows({"a": n}), split={"queries": share, "min_history": 1})
    held_out = {(0.07, 100): 7}.get((share, n), ceil(share * n))
    assert prompts(dataset.queries()) == [f"a {k}" for k in range(n - held_out + 1, n + 1)]
    assert prompts(dataset.history("a")) == [f"a {k}" for k in range(1, n - held_out + 1)]


def test_targets_have_most_history_and_others_keep_all_their_rows(build: Build) -> None:
    rows = make_rows({"b": 20, "a": 20, "c": 30, "0d": 12, "short": 11, "one": 1})
    dataset = build(rows, split={"target_users": 3, "min_history": 9})
    found = [(user.id, user.role, user.history, user.queries) for user in dataset.users()]
    assert found == [
        ("c", "target", 24, 6),
        ("a", "target", 16, 4),
        ("b", "target", 16, 4),
        ("0d", "other", 12, 0),
        ("short", "other", 11, 0),
        ("one", "other", 1, 0),
    ]
    assert dataset.user("0d") == found_user(dataset, "0d")
    assert dataset.user("nobody") is None


def found_user(dataset: Dataset, name: str) -> Any:
    return next(user for user in dataset.users("other") if user.id == name)


def test_too_little_history_is_said_with_the_longest(build: Build) -> None:
    with pytest.raises(DataError) as caught:
        build(make_rows({"a": 5, "b": 3, "one": 1}))
    assert str(caught.value) == (
        "split.min_history: no user has 10 history rows and a query besides; of 3 users the longest history has 4 rows"
        "; lower it to 4 or less, or add rows"
    )


def test_too_little_history_names_the_rows_that_repeat_another(build: Build) -> None:
    same = {"input": "in", "output": "out"}
    rows = [row | same for row in make_rows({"a": 20, "b": 20}, timestamp=None, item_id=None)]
    with pytest.raises(DataError, match=r"has 0 rows; 38 rows repeat another one and do not count$"):
        build(rows)


def test_users_on_one_side_of_the_date_are_said_to_have_no_query(build: Build) -> None:
    rows = make_rows({"early": 30}) + [row | {"timestamp": "2030-01-01"} for row in make_rows({"late": 8})]
    with pytest.raises(DataError, match=r"of 2 users 1 have that history, but no query; split\.by: time gives"):
        build(rows, split={"by": "time-global"})


def test_users_without_times_are_split_in_seeded_order(build: Build) -> None:
    rows = make_rows({"a": 40}, timestamp=None)
    first, same, other = (build(rows, split={"seed": seed}) for seed in (0, 0, 1))
    assert len(list(first.queries())) == 8
    assert prompts(first.queries()) == prompts(same.queries()) != prompts(other.queries())
    assert summarize(first).untimed_users == 1


def test_one_date_for_all(build: Build) -> None:
    rows = make_rows({"a": 20, "b": 15, "early": 4}) + make_rows({"a": 2}, timestamp=None, input="when?")
    dataset = build(rows, split={"by": "time-global", "target_users": 1, "queries": 0.2})
    # 39 timed rows; 8 of them (.205) lie at 14 or later: 14 to 20 of a, 14 and 15 of b are 9, 15 and later are 7.
    assert prompts(dataset.queries()) in ([f"a {n}" for n in range(k, 21)] for k in (14, 15))
    assert summarize(dataset).unused[NO_TIME] == 2
    cutoff = min(row.time for row in dataset.queries())
    assert summarize(dataset).unused[AFTER_CUTOFF] == 16 - cutoff
    assert len(dataset.history("early")) == 4


@pytest.mark.parametrize(
    ("time", "message"),
    [
        (None, "split.by: 'time-global' needs times, and no row has one (data.time names their column)"),
        (3, "split.by: 'time-global' needs rows of two different times, and all have the same"),
    ],
)
def test_one_date_needs_times(build: Build, time: int | None, message: str) -> None:
    with pytest.raises(DataError) as caught:
        build(make_rows({"a": 20}, timestamp=time), split={"by": "time-global"})
    assert str(caught.value) == message


def test_an_item_is_query_or_training_for_everybody(build: Build) -> None:
    rows = [row | {"item_id": row["timestamp"]} for row in make_rows({"a": 60, "b": 50, "other": 20})]
    dataset = build(rows, split={"by": "item", "target_users": 2, "shared_items": "allow"})
    trained, asked = history(dataset), list(dataset.queries())
    assert not {row.item for row in trained} & {row.item for row in asked}
    assert {row.user for row in asked} == {"a", "b"}
    assert 0.05 < len({row.item for row in asked}) / 60 < 0.4
    summary = summarize(dataset)
    assert summary.unused[OTHERS_QUERY_ITEM] == 20 - len(dataset.history("other")) > 0


def test_without_item_ids_the_input_is_the_item(build: Build) -> None:
    rows = [row | {"input": f"Film  {row['timestamp']}"} for row in make_rows({"a": 60}, item_id=None)]
    rows += [row | {"input": f"film {row['timestamp']}"} for row in make_rows({"b": 60}, item_id=None)]
    dataset = build(rows, split={"by": "item", "shared_items": "allow"})
    assert not {normalize(row.prompt) for row in history(dataset)} & {
        normalize(row.prompt) for row in dataset.queries()
    }


def test_shared_items_leave_everybodys_history(build: Build) -> None:
    rows = make_rows({"a": 20, "other": 8})
    rows[20]["item_id"] = "a20"  # other's first row is about the item of a's last
    rows[21]["input"] = " A  19"  # and the second asks what a's last but one asks
    split = {"target_users": 1}
    excluded = build(rows, split=split)
    assert prompts(excluded.history("other")) == [f"other {n}" for n in range(3, 9)]
    assert summarize(excluded).unused == {SHARED: 2}
    for allowed in (build(rows, split=split | {"shared_items": "allow"}), build(rows, split=split, task=CHOICE)):
        assert len(allowed.history("other")) == 8
        assert summarize(allowed).unused == {}


CHOICE = {"kind": "classification"}


def test_a_target_whose_history_is_all_shared_is_dropped_and_counted(build: Build) -> None:
    rows = make_rows({"a": 20, "b": 15})
    for row in rows[20:32]:
        row["item_id"] = "a20"
    dataset = build(rows)
    assert [user.id for user in dataset.users("target")] == ["a"]
    assert {row.user for row in dataset.queries()} == {"a"}
    assert summarize(dataset).dropped_targets == 1
    with pytest.raises(DataError, match="^split.shared_items: 'exclude' leaves no target any history, since all of it"):
        build(make_rows({"a": 20}, item_id="same"))


def test_max_queries_goes_round_the_users(build: Build) -> None:
    rows = make_rows({"a": 100, "b": 50, "c": 50})
    drawn = [build(rows, split={"max_queries": 9, "seed": seed}) for seed in (0, 0, 1)]
    assert Counter(row.user for row in drawn[0].queries()) == {"a": 3, "b": 3, "c": 3}
    assert prompts(drawn[0].queries()) == prompts(drawn[1].queries()) != prompts(drawn[2].queries())
    assert summarize(drawn[0]).unused == {BEYOND_BUDGET: 31}
    assert prompts(drawn[0].history("a")) == [f"a {n}" for n in range(1, 81)]


@pytest.mark.parametrize("by", ["time", "time-global", "item", "random"])
def test_validation_never_sees_the_queries(build: Build, by: str) -> None:
    rows = make_rows({"a": 100, "b": 80, "c": 60, "other": 30})
    split = {"by": by, "target_users": 3}
    real, validation = build(rows, split=split), build(rows, split=split | {"evaluate_on": "validation"})
    queries = {row.prompt for row in real.queries()}
    asked, trained = set(prompts(validation.queries())), set(prompts(history(validation)))
    assert asked and trained
    assert not (asked | trained) & queries
    assert asked <= set(prompts(history(real)))
    assert summarize(validation).unused[HELD_OUT] == len(queries)
    assert validation.sha256 != real.sha256


def test_random_is_seeded_per_user(build: Build) -> None:
    rows = make_rows({"a": 50, "b": 50})
    first, same, other = (build(rows, split={"by": "random", "seed": seed}) for seed in (0, 0, 1))
    assert prompts(first.queries()) == prompts(same.queries()) != prompts(other.queries())
    held: dict[str, list[float]] = defaultdict(list)
    for row in first.queries():
        held[row.user].append(row.time or 0)
    assert {user: len(times) for user, times in held.items()} == {"a": 10, "b": 10}
    assert min(held["a"]) < 40
    assert held["a"] != held["b"]
