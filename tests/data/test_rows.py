from __future__ import annotations

from datetime import date, datetime

import pytest
from hypothesis import given
from hypothesis import strategies as st

from proper.data.rows import BadValue, parse_template
from proper.data.values import plain
from proper.errors import DataError


@pytest.mark.parametrize(
    ("value", "text"),
    [
        ("as it is ", "as it is "),
        (4.0, "4.0"),
        (4, "4"),
        (True, "True"),
        (["Crime", "Drama"], "Crime, Drama"),
        ([1, 2.5], "1, 2.5"),
        ([], ""),
        ({"a": "é"}, '{"a": "é"}'),
        (date(2020, 2, 3), "2020-02-03"),
        (datetime(2020, 2, 3, 4, 5), "2020-02-03T04:05:00"),
    ],
)
def test_values_are_written_plainly(value: object, text: str) -> None:
    assert plain(value) == text


@pytest.mark.parametrize(
    ("value", "what"),
    [(None, "null"), (float("nan"), "NaN"), ([1, None], "null"), (b"x", "bytes, expected text")],
)
def test_values_without_text_are_refused(value: object, what: str) -> None:
    with pytest.raises(ValueError, match=f"^{what}$"):
        plain(value)


def test_a_template_fills_columns_and_keeps_escaped_braces() -> None:
    template = parse_template("{{{a}}} and {b c}{a}", "data.prompt")
    assert template.columns == ("a", "b c", "a")
    assert template.fill({"a": 1, "b c": "{a}"}) == "{1} and {a}1"


def test_a_place_is_a_column_name_and_nothing_else() -> None:
    template = parse_template("{a.real} {b[0]}", "data.prompt")
    assert template.columns == ("a.real", "b[0]")
    with pytest.raises(BadValue, match="^a.real: missing$"):
        template.fill({"a": 1, "b": [2]})


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{a", "data.prompt: not a template: expected '}' before end of string in '{a'; write a brace as '{{' or '}}'"),
        (
            "a}",
            "data.prompt: not a template: Single '}' encountered in format string in 'a}'; "
            "write a brace as '{{' or '}}'",
        ),
        ("x {}", "data.prompt: a field without a column's name in 'x {}'"),
        ("{a:>3}", "data.prompt: '{a}' takes a column's name and no format code, in '{a:>3}'"),
        ("{a!r}", "data.prompt: '{a}' takes a column's name and no format code, in '{a!r}'"),
    ],
)
def test_a_malformed_template_is_one_line_naming_the_setting(text: str, message: str) -> None:
    with pytest.raises(DataError) as caught:
        parse_template(text, "data.prompt")
    assert str(caught.value) == message


@given(st.text(), st.text())
def test_any_text_survives_escaping_and_any_value_is_put_in_unread(literal: str, value: str) -> None:
    escaped = literal.replace("{", "{{").replace("}", "}}")
    assert parse_template(escaped + "{x}" + escaped, "k").fill({"x": value}) == literal + value + literal
