"""Charts: the same bytes each time, colours of the palette only, tooltips on the marks, and values that do not vary."""

from __future__ import annotations

import re
import subprocess
import sys
from xml.etree import ElementTree

import matplotlib
import pytest
from hypothesis import given
from hypothesis import strategies as st

from proper.reports.charts import canvas, color, key, log_axis, value_axis, whiskers
from proper.reports.curves import curves
from proper.reports.figures import forest, gains, heat, main_metric, maps, values
from proper.reports.load import CurvePoint, ReportedMetric, RoutedUser, UserGain
from proper.reports.svg import PALETTE

ROW = ReportedMetric("t", "users", "accuracy", 0.5, None, (0.4, 0.65), None, None, None, True, True)


def drawn(tip: str = "one", label: str = "a chart") -> tuple[str, str]:
    """One chart, for a page and as a file."""
    with canvas(label, 300, (100, 40)) as drawing:
        whiskers(drawing, [0, 1], [(0.5, (0.4, 0.6)), (0.25, None)], [tip, "two"], 1)
        value_axis(drawing.axes)
    return str(drawing.svg), drawing.file


def test_a_chart_is_the_same_each_time_and_leaves_matplotlib_as_it_is() -> None:
    before = dict(matplotlib.rcParams)
    assert drawn() == drawn()
    assert dict(matplotlib.rcParams) == before


def test_a_page_takes_colours_from_its_style_sheet_and_a_file_brings_them() -> None:
    page, file = drawn()
    assert not re.search("#[0-9a-f]{6}", page) and "var(--c1)" in page and "<style" not in page
    assert all(f"--c1:{shade};" in file for shade in PALETTE["c1"])
    lights = [light for light, _ in PALETTE.values()]
    assert len(set(lights)) == len(lights)
    names = {light: name for name, (light, _) in PALETTE.items()}
    assert names[color(1)] == "c1" == names[color(9)]


def test_every_mark_has_its_tooltip_and_the_drawing_its_label() -> None:
    page, file = drawn('"><script>\x00', "what <it> shows")
    root = ElementTree.fromstring(page.partition(">")[2].removesuffix("</div>"))
    tips = {group.get("class"): [mark.get("data-tip") for mark in group.iter() if mark.get("data-tip")]
            for group in root.iter("g") if group.get("class") in {"interval", "mark"}}  # fmt: skip
    assert tips == {"interval": ['"><script>\ufffd'], "mark": ['"><script>\ufffd', "two"]}
    assert root.get("aria-label") == "what <it> shows" and root.get("role") == "img"
    assert "<script>" not in page


def test_titles_stand_in_a_file_where_a_page_has_tooltips() -> None:
    root = ElementTree.fromstring(drawn()[1])
    titles = [element.text for element in root.iter() if element.tag.endswith("title")]
    assert titles == ["one", "one", "two"]


def test_ids_of_two_charts_differ() -> None:
    first, second = (set(re.findall(r'id="([^"]+)"', drawn(label=label)[0])) for label in ("one", "other"))
    assert first and not first & second


def test_matplotlib_is_loaded_when_a_chart_is_drawn() -> None:
    code = "import sys, proper.reports.html; sys.exit('matplotlib' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


@given(st.lists(st.integers(min_value=1, max_value=10**6), min_size=1, max_size=20))
def test_ticks_of_a_logarithmic_axis_are_few_and_inside(lengths: list[int]) -> None:
    from matplotlib.figure import Figure

    axes = Figure().add_axes((0, 0, 1, 1))
    ticks = log_axis(axes, lengths)
    low, high = axes.get_ylim()
    assert low < min(lengths) <= max(lengths) < high
    assert len(ticks) <= 8 and all(low <= tick <= high for tick in ticks)


@pytest.mark.parametrize("value", [0.0, 0.5, -3.0, 1e9, 1e-9])
def test_one_of_everything_and_no_variation_still_draws(value: float) -> None:
    row = ReportedMetric("t", "users", "accuracy", value, None, None, None, None, None, True, True)
    user = RoutedUser("u", None, (0.5, 0.5), 0, (value, value), None)
    side = {"method": "users", "metric": "accuracy", "higher_is_better": True, "first": {"value": value}}
    charts = [
        main_metric([row], {}),
        heat([user, user]),
        *maps([user]),
        gains([UserGain("u", 0, None, "users", None, value)], "users", "accuracy"),
        *curves({"elsewhere": [CurvePoint(0, 1, value, None, None, None)]}),
        values([side], ("a", "b")),
        forest([{**side, "difference": value}], ("a", "b")),
    ]
    assert all(chart is not None and "nan" not in chart.drawing.lower() for chart in charts)


def test_nothing_to_draw_is_no_chart() -> None:
    assert main_metric([], {}) is None and heat([]) is None and maps([]) == [] and curves({}) == []
    assert gains([UserGain("u", 3, 1, "users", None, None)], "users", "accuracy") is None
    assert values([], ("a", "b")) is None and forest([], ("a", "b")) is None


def test_a_value_stands_where_the_axis_says() -> None:
    """The mark of a value lies between its two grid lines, in proportion, and its bar ends at the interval's ends."""
    with canvas("proportion", 300, (100, 10)) as drawing:
        whiskers(drawing, [0], [(0.25, (0.0, 0.75))], ["v"], 0)
        value_axis(drawing.axes)
        drawing.axes.set_ylim(0, 1)
    root = ElementTree.fromstring(drawing.svg.partition(">")[2].removesuffix("</div>"))
    bar = next(group for group in root.iter("g") if group.get("class") == "interval")[0].get("d", "").split()
    assert [float(bar[2]), float(bar[5])] == [126.0, 51.0]  # 26 pixels above a panel of 100


def test_many_users_are_thinned_and_the_caption_says_so() -> None:
    users = [RoutedUser(f"u{n}", n, (0.9, 0.1) if n % 2 else (0.1, 0.9), (n + 1) % 2, None, None) for n in range(1000)]
    chart = heat(users)
    assert chart is not None and cells(str(chart.drawing), "cells") == 800 and chart.drawing.count("data-tip") == 400
    assert "400 of 1,000 are drawn, evenly spaced." in chart.caption
    many = [UserGain(f"u{n}", n, 5, "users", None, n - 500.0) for n in range(1000)]
    bars = gains(many, "users", "accuracy")
    assert bars is not None and cells(str(bars.drawing), "bar") == cells(str(bars.drawing), "dot") == 400


def cells(page: str, css: str) -> int:
    """How many marks a group draws."""
    root = ElementTree.fromstring(page[page.index("<svg") : page.index("</svg>") + 6])
    group = next(group for group in root.iter("g") if group.get("class") == css)
    return sum(mark.tag in {"path", "use"} for mark in group.iter()) - sum(
        1 for block in group.iter("defs") for _ in block
    )


def test_a_key_is_the_mark_of_its_category() -> None:
    assert [re.sub("<[^>]+>", "", key(at, "<x>")) for at in (0, 1, 7)] == ["●&lt;x&gt;", "■&lt;x&gt;", "●&lt;x&gt;"]


@pytest.mark.parametrize("lengths", [(14, 25), (20, 20), (1, 1), (3, 4000)])
def test_a_narrow_logarithmic_axis_still_has_ticks(lengths: tuple[int, int]) -> None:
    from matplotlib.figure import Figure

    assert len(log_axis(Figure().add_axes((0, 0, 1, 1)), lengths)) >= 2
