"""Main metric against history length: the slices of `results.json` as one curve per scored method.

The drawn values are also in the report's table of slices.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from markupsafe import Markup

from proper.reports.figures import Figure
from proper.reports.formats import method_name, metric_name, plain, plural, signed, span
from proper.reports.load import RunFiles
from proper.reports.narrative import primary_metrics
from proper.reports.reading import count, interval, number
from proper.reports.svg import Axis, Scale, chart, join, key, linear, path, percent, symbol, tag
from proper.run_folder import LADDER

QUARTERS = ("history-q1", "history-q2", "history-q3", "history-q4")
SHORT = {"under-10": "under 10", "bottom-100": "shortest 100"}
GREY = 7


@dataclass(frozen=True, slots=True)
class HistoryPoint:
    """One method in one slice."""

    value: float
    interval: tuple[float, float] | None


@dataclass(frozen=True, slots=True)
class Part:
    """One slice: its name in results.json, shortest and longest history, number of users, and scores by method."""

    name: str
    reach: tuple[float, float] | None
    users: int
    points: Mapping[str, HistoryPoint]

    @property
    def below(self) -> str:
        """The range of history lengths, short enough for a phone screen."""
        if self.reach is None:
            return ""
        low, high = (f"{edge:.0f}" for edge in self.reach)
        return low if low == high else f"{low}–{high}"


def history_curves(run: RunFiles) -> list[Figure]:
    """Draw the stages together, then each other method against the last stage; nothing with fewer than two slices."""
    rows = primary_metrics(run) if run.metrics else []
    if not rows:
        return []
    metric, higher = rows[0].metric, rows[0].higher_is_better
    parts = _parts(run, metric)
    methods = list(dict.fromkeys(method for part in parts for method in part.points))
    if sum(part.name in QUARTERS for part in parts) < 2 or not methods:
        return []
    stages = [stage for stage in LADDER[1:] if stage in methods] or methods[:1]
    shared = _scale(parts, [method for method in methods if method != "base"] or methods)
    title = f"{metric_name(metric)} ({'higher' if higher else 'lower'} is better)"
    figures = [Figure("Against history length", _draw(parts, stages, shared, title, 280), _caption(parts, stages))]
    for method in (method for method in methods if method not in stages):
        # The bare backbone scores far from all other methods; on their scale its panel would be empty.
        scale = _scale(parts, [method, stages[-1]]) if method == "base" else shared
        drawing = _draw(parts, [method, stages[-1]], scale, "", 150, {stages[-1]: GREY})
        figures.append(Figure(method_name(method), drawing, _gap(parts, method, stages[-1])))
    return figures


def _parts(run: RunFiles, metric: str) -> list[Part]:
    """Return the slices by history length, shortest first, without slices that contain all users."""
    found = {name: [row for row in run.rows("slices") if row.get("slice") == name] for name in (*QUARTERS, *SHORT)}
    everybody = count(run.part("task").get("target_users"))
    parts = []
    for name, rows in found.items():
        points = {
            str(row.get("method")): HistoryPoint(value, interval(row.get("ci95")))
            for row in rows
            if row.get("metric") == metric and (value := number(row.get("value"))) is not None
        }
        users = next((count(row.get("users")) or 0 for row in rows), 0)
        if points and not (name in SHORT and users == everybody):
            parts.append(Part(name, interval(rows[0].get("history")), users, points))
    return parts


def _scale(parts: Sequence[Part], methods: Sequence[str]) -> Scale:
    points = [part.points[method] for part in parts for method in methods if method in part.points]
    return linear([edge for point in points for edge in (point.value, *(point.interval or ()))], pad=0.06)


def _draw(
    parts: Sequence[Part],
    methods: Sequence[str],
    scale: Scale,
    title: str,
    height: int,
    colours: Mapping[str, int] | None = None,
) -> Markup:
    wide = 100 / len(parts)
    hues = {method: (colours or {}).get(method, index) for index, method in enumerate(methods)}
    marks = []
    for index, method in enumerate(methods):
        # Side by side within a column, so that intervals do not overlap.
        shift = (index - (len(methods) - 1) / 2) * wide * 0.56 / len(methods)
        spots = [((at + 0.5) * wide + shift, part) for at, part in enumerate(parts) if method in part.points]
        line = [(x, scale.at(part.points[method].value)) for x, part in spots if part.name in QUARTERS]
        marks.append(path(line, f"trace c{hues[method]}"))
        marks += [_mark(x, part, method, hues[method], scale) for x, part in spots]
    names = [((at + 0.5) * wide, _column(part), part.below) for at, part in enumerate(parts)]
    label = f"{', '.join(map(method_name, methods))} by history length"
    drawing = chart(*marks, height=height, label=label, y=Axis(scale, title), names=names)
    if len(methods) == 1 or not title:
        return drawing
    return join([drawing, tag("p", *(key(hues[method], method_name(method)) for method in methods), class_="keys")])


def _column(part: Part) -> str:
    return f"Q{QUARTERS.index(part.name) + 1}" if part.name in QUARTERS else SHORT[part.name]


def _mark(x: float, part: Part, method: str, colour: int, scale: Scale) -> Markup:
    point = part.points[method]
    tip = f"{method_name(method)}, {_column(part)}\n{plain(point.value)}\n95 % {span(point.interval)}"
    tip += f"\n{plural(part.users, 'user')}, {part.below} items"
    bar = Markup("")
    if point.interval:
        low, high = (percent(100 - scale.at(edge)) for edge in point.interval)
        bar = tag("line", x1=percent(x), x2=percent(x), y1=low, y2=high, class_=f"reach c{colour}")
    return tag("g", bar, symbol(colour, x, scale.at(point.value)), data_tip=tip)


def _caption(parts: Sequence[Part], stages: Sequence[str]) -> str:
    quarters = [part for part in parts if part.name in QUARTERS]
    counts = ", ".join(str(part.users) for part in quarters)
    text = f"Quarters of the users by history length (items below a column; {counts} users), "
    text += "with 95 % intervals over the users of each. "
    if len(quarters) < len(parts):
        text += "Apart at the right: the shortest histories of all. "
    both = [part for part in quarters if {stages[0], stages[-1]} <= set(part.points)]
    if len(stages) > 1 and both:
        first, last = (part.points[stages[-1]].value - part.points[stages[0]].value for part in (both[0], both[-1]))
        text += f"{method_name(stages[-1])} less {method_name(stages[0])}: {signed(first)} in the shortest quarter, "
        text += f"{signed(last)} in the longest; the difference of these two is not tested."
    return text


def _gap(parts: Sequence[Part], method: str, against: str) -> str:
    quarters = [part for part in parts if part.name in QUARTERS and {method, against} <= set(part.points)]
    gaps = [signed(part.points[method].value - part.points[against].value) for part in quarters]
    return f"Less {method_name(against)} (grey), by quarter: {', '.join(gaps)}." if gaps else ""
