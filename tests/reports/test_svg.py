"""Scales keep values in order and inside; marks are escaped; figures survive values that do not vary."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st
from markupsafe import Markup

from proper.reports.curves import curves
from proper.reports.figures import gains, heat, ladder, maps, mini
from proper.reports.load import CurvePoint, ReportedMetric, RoutedUser, UserGain
from proper.reports.svg import linear, logarithmic, tag, tick_text

finite = st.floats(min_value=-1e9, max_value=1e9).map(lambda value: round(value, 6))


@given(st.lists(finite, min_size=1, max_size=20))
def test_linear_keeps_order_and_stays_inside(values: list[float]) -> None:
    scale = linear(values)
    spots = [scale.at(value) for value in sorted(values)]
    assert spots == sorted(spots) and spots[0] >= 0 and spots[-1] <= 100
    assert 1 <= len(scale.ticks) <= 8
    assert all(scale.low - 1e-6 <= tick <= scale.high + 1e-6 for tick in scale.ticks)


@given(st.lists(st.integers(min_value=1, max_value=10**6), min_size=1, max_size=20))
def test_logarithmic_keeps_order_and_stays_inside(values: list[int]) -> None:
    scale = logarithmic(values)
    spots = [scale.at(value) for value in sorted(values)]
    assert spots == sorted(spots) and spots[0] >= 0 and spots[-1] <= 100
    assert len(scale.ticks) <= 8


def test_ticks_are_round_and_told_apart() -> None:
    scale = linear([0.013, 0.094])
    assert [tick_text(tick, scale.ticks) for tick in scale.ticks] == ["0.025", "0.050", "0.075", "0.100"]
    assert tick_text(-2000.0, [-2000.0, 0.0]) == "−2,000"


def test_tags_escape_content_and_attributes() -> None:
    text = tag("text", "<b>&", Markup("<i/>"), data_tip='"><script>', x=1.0, y=None)
    assert text == '<text data-tip="&#34;&gt;&lt;script&gt;" x="1.00">&lt;b&gt;&amp;<i/></text>'


def test_one_of_everything_and_no_variation_still_draws() -> None:
    row = ReportedMetric("t", "users", "accuracy", 0.5, None, None, None, None, None, True, True)
    user = RoutedUser("u", None, (0.5, 0.5), 0, (1.0, 1.0), None)
    figures = [
        ladder([row], {}),
        heat([user, user]),
        *maps([user]),
        gains([UserGain("u", 0, None, "users", None, 0.0)], "users", "accuracy"),
        *curves({"elsewhere": [CurvePoint(0, 1, 2.0, None, None, None)]}),
    ]
    assert all(figure is not None and "nan" not in figure.drawing.lower() for figure in figures)
    assert "nan" not in mini(row, [row])


def test_nothing_to_draw_is_no_figure() -> None:
    assert ladder([], {}) is None and heat([]) is None and maps([]) == [] and curves({}) == []
    assert gains([UserGain("u", 3, 1, "users", None, None)], "users", "accuracy") is None


def test_many_users_are_thinned_and_the_caption_says_so() -> None:
    users = [RoutedUser(f"u{n}", n, (0.9, 0.1) if n % 2 else (0.1, 0.9), (n + 1) % 2, None, None) for n in range(1000)]
    figure = heat(users)
    assert figure is not None and figure.drawing.count("heatcell") == 800
    assert "400 of 1,000 are drawn, evenly spaced." in figure.caption
    many = [UserGain(f"u{n}", n, 5, "users", None, n - 500.0) for n in range(1000)]
    drawn = gains(many, "users", "accuracy")
    assert drawn is not None and drawn.drawing.count("<circle") == 400
