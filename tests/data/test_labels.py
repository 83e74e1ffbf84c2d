from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from proper.config import make_config
from proper.data.dataset import Dataset, prepare
from proper.data.summary import summarize
from proper.data.values import find_label, respelled
from proper.enrolment.history import grown_history
from proper.interactions.log import InteractionLog, LogEntry

Build = Callable[..., Dataset]


def make(spell: Callable[[int, int], object]) -> list[dict[str, Any]]:
    """Rows of 2 users; `spell` writes the answer of a row's number."""
    return [
        {"user_id": user, "input": f"{user} {at}", "output": spell(at % 3 + 1, at), "timestamp": f"20{at + 10}"}
        for user in ("a", "b")
        for at in range(24)
    ]


@pytest.mark.parametrize("kind", ["classification", "rating"])
def test_equal_numbers_are_one_label_whatever_part_of_the_data_spells_them_so(build: Build, kind: str) -> None:
    plain = make(lambda label, at: label)
    # The same rows are there in both spellings: duplicates, as if they were spelled alike.
    mixed = [*make(lambda label, at: float(label) if at % 2 else label), *make(lambda label, at: f"{label}.0")]
    wanted = build(plain, task={"kind": kind})
    found = build(mixed, task={"kind": kind})
    assert found.labels == wanted.labels == ["1", "2", "3"]
    assert summarize(found).duplicates == len(plain)
    assert found.sha256 == wanted.sha256
    assert {row.target for row in found.queries()} == {"1", "2", "3"}
    for user in ("a", "b"):
        assert found.history(user) == wanted.history(user)
        assert list(found.queries(user)) == list(wanted.queries(user))


def test_one_spelling_stays_as_it_is(build: Build) -> None:
    for kind in ("classification", "rating"):
        floats = build(make(lambda label, at: float(label)), task={"kind": kind})
        assert floats.labels == ["1.0", "2.0", "3.0"]
    texts = build(make(lambda label, at: ("3", "3.0", "x")[label - 1]))
    assert {row.target for row in texts.history("a")} == {"3", "3.0", "x"}


def test_lengths_are_those_of_the_spelling_that_stays(tmp_path: Path, jsonl: Callable[..., Path]) -> None:
    path = jsonl(make(lambda label, at: float(label) if at % 2 else label))
    config = make_config({"data": {"path": str(path)}, "task": {"kind": "rating"}})
    with prepare(config, tmp_path / "data.sqlite", lambda prompts, targets: [*map(len, targets)]) as dataset:
        assert {row.tokens for row in dataset.history("a")} == {1}


@pytest.mark.parametrize(
    ("kind", "texts", "changes"),
    [
        ("classification", ["3", "3.0", "3.00", "4.0", "-1", "-1.0"], {"3.0": "3", "3.00": "3", "-1.0": "-1"}),
        ("classification", ["1.1", "1.10", "7", "007", "1e0", "1", "+1", "x"], {}),
        (
            "rating",
            ["3.5", "3.50", "3", "3.0", "+3", "4.0", "1e1", "10"],
            {"3.50": "3.5", "3.0": "3", "+3": "3", "1e1": "10"},
        ),
    ],
)
def test_what_counts_as_one_number(kind: str, texts: list[str], changes: dict[str, str]) -> None:
    assert respelled(texts, kind) == changes


@given(st.lists(st.floats(allow_nan=False, allow_infinity=False) | st.integers(-(10**20), 10**20)))
def test_after_respelling_no_two_ratings_are_equal(values: list[float]) -> None:
    texts = {*map(str, values)}
    changes = respelled(texts, "rating")
    stay = {changes.get(text, text) for text in texts}
    assert len({float(text) for text in stay}) == len(stay)
    assert all(float(old) == float(new) for old, new in changes.items())


def test_a_label_is_found_by_its_letters_first() -> None:
    assert find_label("3.0", ["3", "3.0"], "classification") == "3.0"
    assert find_label("3.0", ["2", "3"], "classification") == "3"
    assert find_label("3", ["2.0", "3.0"], "rating") == "3.0"
    assert find_label("3.5", ["3"], "rating") is None
    assert find_label("x", ["3"], "classification") is None


@pytest.mark.parametrize("spell", [int, float])
def test_interactions_that_arrive_later_take_the_spelling_of_the_run(
    build: Build, tmp_path: Path, spell: Callable[[int], object]
) -> None:
    dataset = build(make(lambda label, at: spell(label)), task={"kind": "classification"})
    log = InteractionLog(tmp_path / "users")
    log.append("", "new", [LogEntry("p", "3"), LogEntry("p", "3.0"), LogEntry("p", "other")])
    grown = grown_history(dataset, log, "", "new", lambda prompts, targets: [1] * len(prompts), "classification")
    log.close()
    assert [each.target for each in grown.items] == [str(spell(3)), str(spell(3)), "other"]
