"""Rows without a model: the usual answers and the first words of the input."""

from __future__ import annotations

import json
from statistics import fmean

import pytest
from hypothesis import given
from hypothesis import strategies as st

from proper.data.dataset import prepare
from proper.data.one_task import one_task
from proper.methods.spec import TrainedRun
from proper.methods.trivial import lead, median_words, user_majority, user_majority_same, usual

STARS = ["0.5", "1.0", "2.0", "3.0", "4.0"]


def test_the_most_frequent_label_and_the_newest_of_equals():
    assert usual({"a": 1, "b": 3, "c": 2}, "classification", ["a", "b", "c"]) == "b"
    assert usual({"a": 2, "b": 1, "c": 2}, "classification", ["a", "b", "c"]) == "c"
    assert usual({"one title": 1, "another": 1}, "generation", []) == "another"
    assert usual({}, "classification", ["a", "b"]) == ""


def test_a_rating_with_equal_errors_is_the_lower_one():
    assert usual({"4.0": 1, "1.0": 2}, "rating", STARS) == "1.0"
    assert usual({"1.0": 1, "0.5": 1}, "rating", STARS) == "0.5"
    assert usual({"4.0": 3, "2.0": 3}, "rating", STARS) == "2.0"


@given(st.dictionaries(st.sampled_from(STARS), st.integers(1, 9), min_size=1))
def test_no_constant_rating_has_a_lower_error(counts):
    history = [float(star) for star, count in counts.items() for _ in range(count)]
    errors = {star: fmean(abs(float(star) - rating) for rating in history) for star in STARS}
    assert errors[usual(counts, "rating", STARS)] == pytest.approx(min(errors.values()))


def test_the_lead_is_the_users_text_without_fixed_words(tmp_path, settings):
    """Whether the fixed words are in the template or in every text, and whichever column is the text."""
    rows = [
        {"user_id": user, "timestamp": at, "tag": "x", "item_id": f"{user}{at}",
         "body": f"{user} wrote {at} long words about things", "output": f"{user} wrote {at}"}
        for user in ("ann", "bob") for at in range(6)
    ]  # fmt: skip
    path = tmp_path / "rows.jsonl"
    path.write_text(
        "".join(json.dumps({**row, "input": f"Shorten this: {row['body']}\nTitle:"}) + "\n" for row in rows)
    )
    for prompt in ("{input}", "Tag {tag}\n{body}\nShort:", "Shorten this: {body}"):
        config = settings(
            data={"path": str(path), "prompt": prompt},
            task={"kind": "generation"},
            split={"min_history": 3, "shared_items": "allow"},
        )
        with prepare(config, tmp_path / "data.sqlite", lambda prompts, targets: [1] * len(prompts)) as dataset:
            assert median_words(dataset) == 3
            found = lead(TrainedRun(config, dataset, tmp_path, 0)).predictions
        # "words about things" ends every text; what the texts share is no user's own, and no title begins there.
        assert [row.prediction for row in found] == [row.target for row in found], prompt


def test_the_same_items_are_those_of_the_adapter(tmp_path, settings):
    labels = ["a"] * 6 + ["b"] * 3 + ["c"] * 2
    path = tmp_path / "rows.jsonl"
    path.write_text(
        "".join(
            json.dumps({"user_id": "ann", "timestamp": at, "input": f"text {at}", "output": label, "item_id": at})
            + "\n"
            for at, label in enumerate(labels)
        )
    )
    config = settings(data={"path": str(path)}, users={"max_items": 4}, split={"queries": 0.1, "min_history": 3})
    with prepare(config, tmp_path / "data.sqlite", lambda prompts, targets: [1] * len(prompts)) as dataset:
        place = TrainedRun(config, dataset, tmp_path, 0)
        assert len(dataset.history("ann")) == 9
        assert {row.prediction for row in user_majority(place).predictions} == {"a"}
        assert {row.prediction for row in user_majority_same(place).predictions} == {"b"}


def test_the_same_items_of_several_tasks_are_those_of_the_one_adapter(tmp_path, settings):
    """The adapter saw the newest 8 rows of both tasks together, 4 of each."""
    labels = ["a"] * 6 + ["b"] * 3 + ["c"] * 2
    path = tmp_path / "rows.jsonl"
    rows = [{"user_id": "ann", "timestamp": at, "input": f"text {at}", "output": x} for at, x in enumerate(labels)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    task = {"kind": "classification"}
    tasks = {
        "first": {"data": {"path": str(path)}, "task": task},
        "second": {"data": {"path": str(path), "prompt": "Again {input}"}, "task": task},
    }
    config = settings(
        tasks=tasks, data=tasks["first"]["data"], task=task, users={"max_items": 8}, split={"queries": 0.1}
    )
    with prepare(config, tmp_path / "data.sqlite", lambda prompts, targets: [1] * len(prompts)) as dataset:
        seen = {row.id for row in dataset.history("ann", 8)}
        for name in tasks:
            with one_task(dataset, name) as own:
                place = TrainedRun(config.each_task[name], own, tmp_path, 0)
                counted = [row.target for row in own.history("ann") if row.id in seen]
                assert counted == ["a", "b", "b", "b"] and len(own.history("ann")) == 9
                assert {row.prediction for row in user_majority(place).predictions} == {"a"}
                assert {row.prediction for row in user_majority_same(place).predictions} == {"b"}


def test_the_lead_of_a_conversation_is_of_its_last_question(tmp_path, settings):
    def talk(user, at):
        said = [
            ("user", f"first {at}"),
            ("assistant", "yes"),
            ("user", f"{user} asks {at}"),
            ("assistant", f"{user} asks"),
        ]
        return {"user_id": user, "timestamp": at, "messages": [{"role": r, "content": text} for r, text in said]}

    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(talk(user, at)) + "\n" for user in ("ann", "bob") for at in range(6)))
    config = settings(data={"path": str(path)}, task={"kind": "generation"}, split={"min_history": 3})
    with prepare(config, tmp_path / "data.sqlite", lambda prompts, targets: [1] * len(prompts)) as dataset:
        found = lead(TrainedRun(config, dataset, tmp_path, 0)).predictions
    assert {row.prediction for row in found} == {"ann asks", "bob asks"}
