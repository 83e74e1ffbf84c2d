"""Figures of the comparison of two runs: values by stage, and a forest plot of paired differences."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from markupsafe import Markup

from proper.reports.figures import Figure
from proper.reports.formats import method_name, metric_name, plain, signed, span
from proper.reports.reading import interval, mapping, number
from proper.reports.svg import Axis, Scale, chart, join, key, linear, percent, symbol, tag
from proper.run_folder import LADDER

Row = Mapping[str, Any]


def values(rows: Sequence[Row], names: tuple[str, str]) -> Figure | None:
    """Draw the stages of both runs on the main metric, with 95 % intervals."""
    stages = [row for stage in LADDER for row in rows if row["method"] == stage]
    if not stages:
        return None
    sides = [[mapping(row.get(side)) for side in ("first", "second")] for row in stages]
    reach = [edge for pair in sides for side in pair for edge in _edges(side)]
    if not reach:
        return None
    scale, wide = linear(reach, pad=0.12), 100 / len(stages)
    marks = []
    for at, (row, pair) in enumerate(zip(stages, sides, strict=True)):
        for index, side in enumerate(pair):
            x = (at + 0.5 + (index - 0.5) * 0.22) * wide
            marks.append(_value(x, index, side, f"{method_name(str(row['method']))}, {names[index]}", scale))
    spots = [((at + 0.5) * wide, method_name(str(row["method"])), "") for at, row in enumerate(stages)]
    metric, better = metric_name(str(stages[0]["metric"])), "higher" if stages[0]["higher_is_better"] else "lower"
    label = f"{metric} of the stages of {names[0]} and {names[1]}"
    drawing = chart(*marks, height=260, label=label, y=Axis(scale, f"{metric} ({better} is better)"), names=spots)
    keys = tag("p", *(key(index, name) for index, name in enumerate(names)), class_="keys")
    caption = "Bars: 95 % intervals over users, each run by itself. They may overlap although the difference, tested "
    caption += "user by user, is clear: that is drawn below."
    return Figure(metric, join([drawing, keys]), caption)


def _edges(side: Row) -> list[float]:
    value = number(side.get("value"))
    return [] if value is None else [value, *(interval(side.get("ci95")) or ())]


def _value(x: float, colour: int, side: Row, name: str, scale: Scale) -> Markup:
    value, reach = number(side.get("value")), interval(side.get("ci95"))
    if value is None:
        return Markup("")
    bar = Markup("")
    if reach:
        low, high = (percent(100 - scale.at(edge)) for edge in reach)
        bar = tag("line", x1=percent(x), x2=percent(x), y1=low, y2=high, class_=f"reach c{colour}")
    tip = f"{name}\n{plain(value)}\n95 % {span(reach)}"
    return tag("g", bar, symbol(colour, x, scale.at(value)), data_tip=tip)


def forest(rows: Sequence[Row], names: tuple[str, str]) -> Figure | None:
    """Draw a forest plot: each method's paired difference with its interval, around zero, one row per method."""
    known = [row for row in rows if number(row.get("difference")) is not None]
    if not known:
        return None
    reach = [edge for row in known for edge in (float(row["difference"]), *(interval(row.get("ci95")) or ()))]
    across = linear([0.0, *reach], pad=0.06)
    lines = [_line(row, across, (at + 0.66) * 100 / len(known)) for at, row in enumerate(known)]
    zero = tag("line", x1=percent(across.at(0.0)), x2=percent(across.at(0.0)), y1="0", y2="100%", class_="grid zero")
    better = "right" if known[0]["higher_is_better"] else "left"
    metric = metric_name(str(known[0]["metric"]))
    title = f"difference in {metric}, {names[0]} less {names[1]} ({better} of the line: {names[0]} is better)"
    label = f"Paired differences of {len(known)} methods"
    drawing = chart(zero, *lines, height=46 * len(known) + 10, label=label, x=Axis(across, title))
    caption = "Paired user by user; bars are 95 % intervals. Blue or orange: better or worse at p < .05, Holm-adjusted "
    caption += "over the methods; grey: not shown by these users."
    return Figure("Differences, paired over common users", drawing, caption)


def _line(row: Row, across: Scale, y: float) -> Markup:
    difference, reach, p = float(row["difference"]), interval(row.get("ci95")), number(row.get("p_adjusted"))
    shown = p is not None and p < 0.05 and difference != 0
    good = (difference > 0) == bool(row["higher_is_better"])
    kind = ("gain" if good else "loss") if shown else "same"
    bar = Markup("")
    if reach:
        low, high = (percent(across.at(edge)) for edge in reach)
        bar = tag("line", x1=low, x2=high, y1=percent(y), y2=percent(y), class_=f"span {kind}")
    name = method_name(str(row["method"]))
    tip = f"{name}\n{signed(difference)}\n95 % {span(reach, sign=True)}" + ("" if p is None else f"\np {plain(p)}")
    dot = tag("circle", cx=percent(across.at(difference)), cy=percent(y), r=6, class_=f"dot {kind}")
    text = tag("text", f"{name} {signed(difference)}", x="0", y=percent(y), dy="-12", class_="row")
    return tag("g", bar, dot, text, data_tip=tip)
