from __future__ import annotations

from datetime import UTC, date, datetime, timedelta, timezone

import pytest
from hypothesis import given
from hypothesis import strategies as st

from proper.data.values import parse_time


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
        ("1522368000", "2018-03-30"),
        ("1522368000000", "2018-03-30"),
        (0, "1970-01-01"),
        (-86400, "1969-12-31"),
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
