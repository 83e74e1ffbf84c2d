"""Two charts as SVG files: values with intervals by method, and curves over the length of a history."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from proper.reports import charts
from proper.reports.charts import TICKS, canvas, color

if TYPE_CHECKING:
    from matplotlib.axes import Axes

WIDE, LEFT, ROW = 720, 250, 26


@dataclass(frozen=True)
class Row:
    """A value with its interval; `main` is what others are compared with."""

    name: str
    value: float
    low: float
    high: float
    main: bool = False


@dataclass(frozen=True)
class Panel:
    """Rows on one metric."""

    title: str
    rows: Sequence[Row]


@dataclass(frozen=True)
class Line:
    """A method's values along x, as (x, value, low, high)."""

    name: str
    points: Sequence[tuple[float, float, float, float]]


def intervals(panels: Sequence[Panel], label: str) -> str:
    """Draw panels below each other, each with its own scale: a dot and a 95 % interval for each method."""
    plots = [(ROW * len(panel.rows), 30) for panel in panels]
    with canvas(label, WIDE, *plots, left=LEFT) as drawing:
        for at, panel in enumerate(panels):
            axes = drawing.panels[at]
            for place, row in enumerate(panel.rows):
                hue = "down" if row.main else "accent"
                tip = f"{row.name}: {row.value:.3f} [{row.low:.3f}, {row.high:.3f}]"
                score = (row.value, (row.low, row.high))
                charts.whiskers(drawing, [place], [score], [tip], hue, size=70, across=True, panel=at)
            axes.set_ylim(len(panel.rows) - 0.5, -0.5)
            axes.set_yticks(range(len(panel.rows)), [row.name for row in panel.rows], color=color("ink"))
            axes.grid(visible=False, axis="y")
            axes.grid(visible=True, axis="x")
            charts.value_axis(axes, across=True)
            _title(axes, panel.title)
    return drawing.file


def curves(lines: Sequence[Line], across: str, up: str, label: str) -> str:
    """Draw lines over a logarithmic axis, with an interval at each point and a legend at the left."""
    lengths = sorted({point[0] for line in lines for point in line.points})
    # One pixel of the plot, so that the intervals of one x stand side by side.
    pixel = (math.log(lengths[-1] / lengths[0]) or 1.0) * 1.1 / (WIDE - LEFT)
    with canvas(label, WIDE, (300, TICKS), left=LEFT) as drawing:
        axes = drawing.axes
        for place, line in enumerate(lines):
            aside = 6 * (place - (len(lines) - 1) / 2) * pixel
            spots = [math.log(x) + aside for x, *_ in line.points]
            values = [value for _, value, *_ in line.points]
            axes.plot(spots, values, color=color(place), linewidth=2, gid="line")
            tips = [f"{line.name}, {x:g}: {value:.3f} [{low:.3f}, {high:.3f}]" for x, value, low, high in line.points]
            scores = [(value, (low, high)) for _, value, low, high in line.points]
            charts.whiskers(drawing, spots, scores, tips, place, 50, charts.marker(place))
            _legend(axes, place, line.name)
        axes.set_xticks([math.log(x) for x in lengths], [f"{x:g}" for x in lengths])
        charts.value_axis(axes)
        charts.titles(axes, across=across)
        _title(axes, up)
    return drawing.file


def _title(axes: Axes, text: str) -> None:
    place: dict[str, Any] = {"xycoords": ("figure fraction", "axes fraction"), "textcoords": "offset points"}
    axes.annotate(text, (0, 1), (8, 9), weight="bold", size=13, **place)


def _legend(axes: Axes, place: int, name: str) -> None:
    where: dict[str, Any] = {"xycoords": ("figure fraction", "axes fraction"), "textcoords": "offset points"}
    axes.annotate(charts.GLYPHS[place % len(charts.GLYPHS)], (0, 1), (8, -16 - 22 * place), color=color(place), **where)
    axes.annotate(name, (0, 1), (26, -16 - 22 * place), **where)
