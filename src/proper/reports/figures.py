"""Charts of the report and of the comparison of two runs: pure functions from loaded values to drawings with captions.

Tooltips show the user and the values.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, TypeVar

from markupsafe import Markup

from proper.reports import charts
from proper.reports.charts import NAMES, TICKS, Canvas, Chart, canvas, color
from proper.reports.formats import method_name, metric_name, plain, plural, signed, span
from proper.reports.load import ReportedMetric, RoutedUser, UserGain
from proper.reports.narrative import gain_of
from proper.reports.reading import interval, mapping, number

if TYPE_CHECKING:
    from matplotlib.axes import Axes
from proper.run_folder import STAGE_METHODS

Item = TypeVar("Item")
Row = Mapping[str, Any]

MAX_COLUMNS = 400
MAX_MARKS = 1500


def main_metric(rows: Sequence[ReportedMetric], changes: dict[str, str]) -> Chart | None:
    """Draw the stages of one task's main metric with 95 % intervals; `changes` holds each stage's relative gain."""
    stages = [row for stage in STAGE_METHODS for row in rows if row.method == stage]
    if not stages:
        return None
    metric, better = metric_name(stages[0].metric), "higher" if stages[0].higher_is_better else "lower"
    values = ", ".join(f"{method_name(row.method)} {plain(row.value)}" for row in stages)
    columns = [(method_name(row.method), changes.get(row.method, "")) for row in stages]
    with canvas(f"{metric} by stage: {values}", 480, (210, NAMES)) as drawing:
        drawing.axes.plot([row.value for row in stages], color=color("same"), linewidth=1.5, linestyle=(0, (2, 3)))
        columns_with_values(drawing, stages, columns, f"{metric} ({better} is better)")
    caption = (
        "Dots: all queries. Bars: 95 % intervals over users. Under a name: the relative change from the stage before, "
        "positive where better, in brackets where the test does not show a difference. "
        "Users differ more than stages do, so bars may overlap although a step, tested user by user, is clear."
    )
    return Chart(f"{stages[0].task}: {metric}" if stages[0].task else metric, drawing.svg, caption)


def columns_with_values(
    drawing: Canvas, rows: Sequence[ReportedMetric], columns: Sequence[tuple[str, str]], title: str
) -> None:
    """Draw one column per row: the value with its interval, the number above it, and two lines of text below it."""
    tips = [
        f"{method_name(row.method)}\n{metric_name(row.metric)} {_value_text(row.value, row.interval)}" for row in rows
    ]
    for at, row in enumerate(rows):
        hue = "same" if row.method == "base" else "accent"
        charts.whiskers(drawing, [at], [(row.value, row.interval)], [tips[at]], hue, size=150)
        top = max(row.value, row.interval[1] if row.interval else row.value)
        style: Any = {"textcoords": "offset points", "ha": "center", "weight": "bold", "gid": "value"}
        drawing.axes.annotate(plain(row.value), (at, top), (0, 10), **style)
    charts.names(drawing.axes, columns)
    charts.value_axis(drawing.axes, pad=0.16)
    charts.titles(drawing.axes, title)


def _value_text(value: float, ends: tuple[float, float] | None) -> str:
    return f"{plain(value)}\n95 % {span(ends)}"


def heat(routed: Sequence[RoutedUser], of: str = "") -> Chart | None:
    """Draw a heat map of mean gates: experts as rows, users as columns ordered by their main expert.

    Args:
        routed: the users.
        of: the run, where a page shows more than one.
    """
    if not routed:
        return None
    ordered = sorted(routed, key=lambda user: (user.main, -user.gates[user.main], user.user))
    users, experts = _thin(ordered, MAX_COLUMNS), max(len(user.gates) for user in routed)
    gates = [[user.gates[row] if row < len(user.gates) else 0.0 for user in users] for row in range(experts)]
    low, high = min(map(min, gates)), max(map(max, gates))
    label = f"Mean gates of {len(users)} users over {experts} experts{f', {of}' if of else ''}"
    with canvas(label, 900, (max(120, 34 * experts), 24)) as drawing:
        _cells(drawing, gates)
        drawing.bands(drawing.axes, [(at, at + 1) for at in range(len(users))], [_gate_tip(user) for user in users])
        borders = [at for at in range(1, len(users)) if users[at].main != users[at - 1].main]
        drawing.axes.vlines(borders, 0, experts, colors=color("card"), linewidth=2)
        charts.titles(drawing.axes, "expert")
        drawing.axes.annotate(
            "users, ordered by main expert →", (1, 0), (0, -18), "axes fraction", "offset points",
            ha="right", color=color("soft"),
        )  # fmt: skip
    ramp = Markup('<span class="key">gate {}<i class="ramp"></i>{}</span>').format(plain(low, 2), plain(high, 2))
    caption = f"One column per user, one row per expert; a stronger colour is a larger gate. {_shown(users, routed)}"
    caption += (
        "Blocks along the diagonal: groups of users with their own mixture. Equal columns: routing does not differ."
    )
    return Chart("Users and experts", Markup("{}{}").format(drawing.svg, ramp), caption)


def _cells(drawing: Canvas, gates: Sequence[Sequence[float]]) -> None:
    from matplotlib.colors import LinearSegmentedColormap, to_rgba

    axes, full = drawing.axes, color("heat")
    ramp = LinearSegmentedColormap.from_list("gates", [to_rgba(full, 0.0), to_rgba(full, 1.0)])
    axes.grid(visible=False)
    axes.axvspan(0, len(gates[0]), color=color("empty"), linewidth=0)
    cells = axes.pcolormesh(gates, cmap=ramp)
    drawing.tips(cells, [], "cells")
    axes.set(xlim=(0, len(gates[0])), ylim=(len(gates), 0), xticks=[])
    marks = [f"{row} {charts.GLYPHS[row % len(charts.GLYPHS)]}" for row in range(len(gates))]
    axes.set_yticks([row + 0.5 for row in range(len(gates))], marks)
    for row, text in enumerate(axes.get_yticklabels()):
        text.set_color(color(row))


def _gate_tip(user: RoutedUser) -> str:
    tip = f"user {user.user}\n" + "\n".join(f"expert {at}: {plain(gate)}" for at, gate in enumerate(user.gates))
    tip += f"\nmain expert {user.main}"
    return tip + ("" if user.history is None else f"\nhistory {plural(user.history, 'item')}")


def maps(routed: Sequence[RoutedUser]) -> list[Chart]:
    """Draw 2-D scatter plots of users' embeddings, coloured by main expert and, if known, by true group."""
    known = [user for user in routed if user.position]
    placed = _thin(known, MAX_MARKS)
    if not placed:
        return []
    counts = {index: sum(user.main == index for user in placed) for index in sorted({user.main for user in placed})}
    labels = [(index, f"expert {index} ({amount})") for index, amount in counts.items()]
    drawing = _scatter(placed, [user.main for user in placed], "coloured by main expert")
    caption = f"One mark per user; users with similar embeddings are near each other. {_shown(placed, known)}"
    caption += "Clusters of one colour: the router reads the embeddings. Distances are of a projection, not a measure."
    found = [Chart("User embeddings by main expert", drawing + charts.keys(labels), caption)]
    truth = [user for user in placed if user.group is not None]
    if truth:
        groups = sorted({user.group for user in truth if user.group is not None})
        labels = [(at, f"true group {group}") for at, group in enumerate(groups)]
        drawing = _scatter(truth, [groups.index(user.group or 0) for user in truth], "coloured by true group")
        caption = (
            "The same map with the planted groups, which training never saw. Clusters of one colour: groups found."
        )
        found.append(Chart("User embeddings by true group", drawing + charts.keys(labels), caption))
    return found


def _scatter(users: Sequence[RoutedUser], hues: Sequence[int], label: str) -> Markup:
    with canvas(f"Map of {len(users)} user embeddings, {label}", 480, (300, 8), left=8, top=8) as drawing:
        for hue in sorted(set(hues)):
            inside = [user for user, own in zip(users, hues, strict=True) if own == hue]
            points = [user.position or (0.0, 0.0) for user in inside]
            look: Any = {"color": color(hue), "edgecolor": color("card"), "linewidth": 0.6}
            x, y = zip(*points, strict=True)
            shape = charts.marker(hue)
            marks = drawing.axes.scatter(x, y, 52 * charts.MARKERS[shape], marker=shape, **look)
            drawing.tips(marks, [_position_tip(user) for user in inside], "mark")
        hide_ticks(drawing.axes)
    return drawing.svg


def hide_ticks(axes: Axes) -> None:
    """Draw a frame without ticks, for a map whose axes have no meaning of their own."""
    axes.set(xticks=[], yticks=[])
    for spine in axes.spines.values():
        spine.set_visible(True)


def _position_tip(user: RoutedUser) -> str:
    tip = f"user {user.user}\nmain expert {user.main} (gate {plain(user.gates[user.main], 2)})"
    tip += "" if user.group is None else f"\ntrue group {user.group}"
    return tip + ("" if user.history is None else f"\nhistory {plural(user.history, 'item')}")


def gains(users: Sequence[UserGain], step: str, metric: str) -> Chart | None:
    """Draw each user's gain by one step, largest first, with the length of their history below."""
    known = [(user, gain) for user in users if (gain := gain_of(user, step)) is not None]
    if not known:
        return None
    known.sort(key=lambda pair: (-pair[1], -pair[0].history, pair[0].user))
    shown = _thin(known, MAX_COLUMNS)
    before = {"groups": "population", "users": "groups"}[step]
    what = f"gain in {metric_name(metric)}, {method_name(step).lower()} over {before} (up is better)"
    tips = [_user_tip(user, gain) for user, gain in shown]
    with canvas(f"{what}, and history length, of {len(shown)} users", 900, (190, 6), (100, 12)) as drawing:
        _bars(drawing, [gain for _, gain in shown])
        charts.titles(drawing.axes, what)
        below = drawing.panels[1]
        _histories(drawing, shown)
        charts.titles(below, "history (items, logarithmic), same users in the same order")
        for axes in drawing.panels:
            axes.set(xlim=(-0.5, len(shown) - 0.5), xticks=[])
            drawing.bands(axes, [(at - 0.5, at + 0.5) for at in range(len(shown))], tips)
    caption = f"One bar per user, largest gain first. {_shown(shown, known)}Blue: gain; orange: loss; grey: no change. "
    caption += "If history length decided who gains, the dots would fall from left to right. Rings: no adapter of the "
    return Chart(f"{method_name(before)} → {method_name(step)}", drawing.svg, caption + "user's own.")


def _user_tip(user: UserGain, gain: float) -> str:
    queries = "" if user.queries is None else f"\n{plural(user.queries, 'query')}"
    return f"user {user.user}\ngain {signed(gain)}\nhistory {plural(user.history, 'item')}{queries}\ntier {user.tier}"


def _hue(gain: float) -> str:
    return color("accent" if gain > 0 else "down" if gain < 0 else "same")


def _bars(drawing: Canvas, values: Sequence[float]) -> None:
    axes = drawing.axes
    # A bar of no height would not be drawn; 0.4 % of the range is a hair.
    hair = 0.004 * (max(0.0, *values) - min(0.0, *values) or 1.0)
    ends = [value or hair for value in values]
    wide = 0.8 * 846 / len(values)
    bars = axes.vlines(range(len(values)), 0, ends, colors=list(map(_hue, values)), linewidth=wide)
    drawing.tips(bars, [], "bar")
    charts.value_axis(axes, pad=0.04)


def _histories(drawing: Canvas, shown: Sequence[tuple[UserGain, float]]) -> None:
    axes, lengths = drawing.panels[1], [max(1, user.history) for user, _ in shown]
    charts.log_axis(axes, lengths)
    hues = [_hue(gain) for _, gain in shown]
    fills = [
        "none" if user.tier in {"population", "groups"} else hue for (user, _), hue in zip(shown, hues, strict=True)
    ]
    dots = axes.scatter(range(len(shown)), lengths, s=34, facecolors=fills, edgecolors=hues, linewidths=1.3)
    drawing.tips(dots, [], "dot")


def values(rows: Sequence[Row], names: tuple[str, str]) -> Chart | None:
    """Draw the stages of two runs on the main metric, with 95 % intervals."""
    stages = [row for stage in STAGE_METHODS for row in rows if row["method"] == stage]
    sides = [[mapping(row.get(side)) for row in stages] for side in ("first", "second")]
    if not any(number(one.get("value")) is not None for side in sides for one in side):
        return None
    metric, better = metric_name(str(stages[0]["metric"])), "higher" if stages[0]["higher_is_better"] else "lower"
    with canvas(f"{metric} of the stages of {names[0]} and {names[1]}", 480, (210, NAMES)) as drawing:
        for index, side in enumerate(sides):
            spots = [at + (index - 0.5) * 0.22 for at in range(len(stages))]
            known = [(at, value) for at, one in enumerate(side) if (value := number(one.get("value"))) is not None]
            ends = [(value, interval(side[at].get("ci95"))) for at, value in known]
            titles = [f"{method_name(str(stages[at]['method']))}, {names[index]}" for at, _ in known]
            tips = [f"{title}\n{_value_text(*one)}" for title, one in zip(titles, ends, strict=True)]
            charts.whiskers(drawing, [spots[at] for at, _ in known], ends, tips, index, 60, charts.marker(index))
        charts.names(drawing.axes, [(method_name(str(row["method"])), "") for row in stages])
        charts.value_axis(drawing.axes, pad=0.12)
        charts.titles(drawing.axes, f"{metric} ({better} is better)")
    caption = "Bars: 95 % intervals over users, each run by itself. They may overlap although the difference, tested "
    caption += "user by user, is clear: that is drawn below."
    return Chart(metric, drawing.svg + charts.keys(list(enumerate(names))), caption)


def forest(rows: Sequence[Row], names: tuple[str, str]) -> Chart | None:
    """Draw a forest plot: each method's paired difference with its interval, around zero, one row per method."""
    known = [row for row in rows if number(row.get("difference")) is not None]
    if not known:
        return None
    metric = metric_name(str(known[0]["metric"]))
    with canvas(f"Paired differences of {len(known)} methods", 560, (46 * len(known), TICKS), left=8, top=4) as drawing:
        for at, row in enumerate(known):
            _difference(drawing, at, row)
        drawing.axes.set(ylim=(len(known) - 0.4, -0.9), yticks=[])
        drawing.axes.axvline(0, color=color("same"), linewidth=1, zorder=0)
        charts.value_axis(drawing.axes, pad=0.06, across=True)
        charts.titles(drawing.axes, across=f"difference in {metric}")
    side = "right" if known[0]["higher_is_better"] else "left"
    caption = (
        f"{names[0]} minus {names[1]}, paired user by user: {side} of the line, {names[0]} is better. Bars are 95 % "
    )
    caption += "intervals. Blue or orange: better or worse at p < .05, Holm-adjusted over the methods; grey: not shown."
    return Chart("Differences, paired over common users", drawing.svg, caption)


def _difference(drawing: Canvas, at: int, row: Row) -> None:
    difference, ends, p = float(row["difference"]), interval(row.get("ci95")), number(row.get("p_adjusted"))
    shown = p is not None and p < 0.05 and difference != 0
    better = (difference > 0) == bool(row["higher_is_better"])
    hue = ("accent" if better else "down") if shown else "same"
    name = f"{method_name(str(row['method']))} {signed(difference)}"
    tip = f"{name}\n95 % {span(ends, sign=True)}" + ("" if p is None else f"\np {plain(p)}")
    charts.whiskers(drawing, [at], [(difference, ends)], [tip], hue, size=110, across=True)
    drawing.axes.annotate(name, (0, at), (0, 8), ("axes fraction", "data"), "offset points")


def _thin(values: Sequence[Item], most: int) -> list[Item]:
    """Return at most `most` values, evenly spaced."""
    if len(values) <= most:
        return list(values)
    return [values[index * len(values) // most] for index in range(most)]


def _shown(shown: Sequence[object], of: Sequence[object]) -> str:
    return f"{len(shown):,} of {len(of):,} are drawn, evenly spaced. " if len(shown) < len(of) else ""
