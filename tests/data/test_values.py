"""Values of cells: text, ids, times and equal labels."""

from __future__ import annotations

from collections.abc import Callable
from datetime import UTC, date, datetime, timedelta, timezone
from decimal import Decimal
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from proper.config import make_config
from proper.data.dataset import Dataset, prepare
from proper.data.summary import summarize
from proper.data.values import find_label, parse_time, respelled
from proper.enrolment.history import grown_history
from proper.interactions.log import InteractionLog, LogEntry


@pytest.mark.parametrize(
    ("value", "iso"),
    [
        ("2018", "2018-01-01"),
        ("2018-03", "2018-03-01"),
        ("2018/3", "2018-03-01"),
        ("2018-03-30", "2018-03-30"),
        (" 20180330 ", "2018-03-30"),
        ("2018-03-30 12:30:00", "2018-03-30T12:30:00"),
        ("2018-03-30T12:30:00Z", "2018-03-30T12:30:00"),
        ("2018-03-30T12:30:00+02:00", "2018-03-30T10:30:00"),
        (1522368000, "2018-03-30"),
        (1522368000.0, "2018-03-30"),
        (1522368000000, "2018-03-30"),
        (1522368000000000, "2018-03-30"),
        (1522368000000000000, "2018-03-30"),
        (1.522368e18, "2018-03-30"),
        ("1522368000000000000", "2018-03-30"),
        ("1.522368e+18", "2018-03-30"),
        (-1522368000000000000, "1921-10-05"),
        (-1522368000000, "1921-10-05"),
        (10**11, "5138-11-16T09:46:40"),
        (10**14, "5138-11-16T09:46:40"),
        (10**17, "5138-11-16T09:46:40"),
        (20180330123000, "2018-03-30T12:30:00"),
        (2.018033e13, "2018-03-30"),
        ("20180330123000", "2018-03-30T12:30:00"),
        (18999999999000, "2572-02-01T09:46:39"),
        (21010000000000, "2635-10-13T07:06:40"),
        ("2018-03-30 12:30:00 UTC", "2018-03-30T12:30:00"),
        ("1522368000", "2018-03-30"),
        ("1522368000000", "2018-03-30"),
        (0, "1970-01-01"),
        (-86400, "1969-12-31"),
        ("-86400", "1969-12-31"),
        (Decimal("1522368000.00"), "2018-03-30"),
        (date(2018, 3, 30), "2018-03-30"),
        (datetime(2018, 3, 30, 12), "2018-03-30T12:00:00"),
        (datetime(2018, 3, 30, 12, tzinfo=timezone(timedelta(hours=2))), "2018-03-30T10:00:00"),
    ],
)
def test_every_way_to_write_a_time_is_the_same_number(value: object, iso: str) -> None:
    assert parse_time(value) == datetime.fromisoformat(iso).replace(tzinfo=UTC).timestamp()


@pytest.mark.parametrize(
    ("value", "what"),
    [
        (float("nan"), "NaN is not a time"),
        (float("inf"), "infinity is not a time"),
        (10**400, "infinity is not a time"),
        (253_402_300_800 * 10**9, "a time outside of the years 1 to 9999"),
        (-(10**11), "a time outside of the years 1 to 9999"),
        (datetime(1, 1, 1, tzinfo=timezone(timedelta(hours=1))), "a time outside of the years 1 to 9999"),
        ("9999-12-31T23:59:59-01:00", "'9999-12-31T23:59:59-01:00' is not a time"),
        ("99999999999999999999999", "'99999999999999999999999' is not a time"),
        ("", "'' is not a time"),
        ("soon", "'soon' is not a time"),
        ("2018-13", "'2018-13' is not a time"),
        ("201803", "'201803' is not a time"),
        ("x" * 99, f"'{'x' * 40}...' is not a time"),
        ("0000", "'0000' is not a time"),
        (20181330000000, "'20181330T000000' is not a time"),
        (True, "True is not a time"),
        (["2018"], "a list is not a time"),
    ],
)
def test_what_is_no_time_is_said_in_a_few_words(value: object, what: str) -> None:
    with pytest.raises(ValueError) as caught:
        parse_time(value)
    assert str(caught.value) == what


@given(st.datetimes(), st.datetimes())
def test_order_of_datetimes_is_order_of_numbers(one: datetime, other: datetime) -> None:
    assert (one < other) == (parse_time(one) < parse_time(other.isoformat())) or abs(one - other) < timedelta(seconds=1)


@given(st.text())
def test_text_gives_a_number_or_a_value_error(text: str) -> None:
    try:
        assert isinstance(parse_time(text), float)
    except ValueError as error:
        assert str(error).endswith("is not a time")


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
        ("classification", ["1.1", "1.10", "7", "007", "1e0", "1", "+1", "x", "X", "x y", "x  y"], {}),
        (
            "classification",
            ["caf\u00e9", "cafe\u0301", "New York", "New\u00a0York", "\u200eשלום", "שלום", "3\ufeff", "3"],
            {"cafe\u0301": "caf\u00e9", "New\u00a0York": "New York", "\u200eשלום": "שלום", "3\ufeff": "3"},
        ),
        ("classification", ["👩\u200d👩\u200d👧", "👩👩👧", "می\u200cخواهم", "میخواهم"], {}),
        (
            "rating",
            ["3.5", "3.50", "3", "3.0", "+3", "4.0", "1e1", "10"],
            {"3.50": "3.5", "3.0": "3", "+3": "3", "1e1": "10"},
        ),
    ],
)
def test_what_counts_as_one_label(kind: str, texts: list[str], changes: dict[str, str]) -> None:
    assert respelled(texts, kind) == changes


@given(st.lists(st.floats(allow_nan=False, allow_infinity=False) | st.integers(-(10**20), 10**20)))
def test_after_respelling_no_two_ratings_are_equal(values: list[float]) -> None:
    texts = {*map(str, values)}
    changes = respelled(texts, "rating")
    stay = {changes.get(text, text) for text in texts}
    assert len({float(text) for text in stay}) == len(stay)
    assert all(float(old) == float(new) for old, new in changes.items())


def test_a_label_is_found_by_its_letters_first() -> None:
    assert find_label("cafe\u0301", ["caf\u00e9", "cafe"], "classification") == "caf\u00e9"
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
    grown = grown_history(dataset, log, "", "new", "classification")
    log.close()
    assert [each.target for each in grown.items] == [str(spell(3)), str(spell(3)), "other"]
