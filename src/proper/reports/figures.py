"""Figures of a run's report: pure functions from loaded values to inline SVG with an explanatory caption.

Hover tips show the user and the values.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeVar

from markupsafe import Markup

from proper.reports.formats import method_name, metric_name, plain, plural, signed, span
from proper.reports.load import ReportedMetric, RoutedUser, UserGain
from proper.reports.narrative import gain_of
from proper.reports.svg import Axis, Scale, chart, join, key, linear, logarithmic, path, percent, symbol, tag
from proper.run_folder import LADDER

Item = TypeVar("Item")

MOST_COLUMNS = 400
MOST_MARKS = 1500


@dataclass(frozen=True, slots=True)
class Figure:
    """A drawing with its title and an explanatory caption."""

    title: str
    drawing: Markup
    caption: str


def ladder(rows: Sequence[ReportedMetric], changes: dict[str, str]) -> Figure | None:
    """Draw the stages of one task's main metric with 95 % intervals; `changes` holds each stage's relative gain."""
    stages = sorted((row for row in rows if row.method in LADDER), key=lambda row: LADDER.index(row.method))
    if not stages:
        return None
    reach = [edge for row in stages for edge in (row.value, *(row.interval or ()))]
    scale = linear(reach, pad=0.16)
    spots = [(index + 0.5) * 100 / len(stages) for index in range(len(stages))]
    marks = [path([(x, scale.at(row.value)) for x, row in zip(spots, stages, strict=True)], "rise")]
    for x, row in zip(spots, stages, strict=True):
        marks.append(whisker(x, row, scale))
    names = [(x, method_name(row.method), changes.get(row.method, "")) for x, row in zip(spots, stages, strict=True)]
    metric, better = metric_name(stages[0].metric), "higher" if stages[0].higher_is_better else "lower"
    axis = Axis(scale, f"{metric} ({better} is better)")
    said = ", ".join(f"{method_name(row.method)} {plain(row.value)}" for row in stages)
    drawing = chart(*marks, height=260, label=f"{metric} by stage: {said}", y=axis, names=names)
    caption = (
        "Dots: all queries. Bars: 95 % intervals over users. Under a name: the relative change from the stage before, "
        "positive where better, in brackets where the test does not show it. "
        "Users differ more than stages do, so bars may overlap although a step, tested user by user, is clear."
    )
    return Figure(f"{stages[0].task}: {metric}" if stages[0].task else metric, drawing, caption)


def whisker(x: float, row: ReportedMetric, scale: Scale) -> Markup:
    """Draw a value with its interval at `x` percent: a dot, a bar, the number above, and a hover tip."""
    tip = f"{method_name(row.method)}\n{metric_name(row.metric)} {plain(row.value)}\n95 % {span(row.interval)}"
    across, y = percent(x), percent(100 - scale.at(row.value))
    bar, top = Markup(""), scale.at(row.value)
    if row.interval:
        low, top = scale.at(row.interval[0]), max(top, scale.at(row.interval[1]))
        bar = tag("line", x1=across, x2=across, y1=percent(100 - low), y2=percent(100 - top), class_="whisker")
    dot = tag("circle", cx=across, cy=y, r=7, class_=f"stage {row.method}")
    text = tag("text", plain(row.value), x=across, y=percent(100 - top), dy="-9", class_="value")
    return tag("g", bar, dot, text, data_tip=tip)


def mini(row: ReportedMetric, rows: Sequence[ReportedMetric]) -> Markup:
    """Draw one method's value and interval for a table cell, on the common range of `rows` (same metric)."""
    scale = linear([edge for one in rows for edge in (one.value, *(one.interval or ()))])
    bar = Markup("")
    if row.interval:
        low, high = (percent(scale.at(edge)) for edge in row.interval)
        bar = tag("line", x1=low, x2=high, y1="50%", y2="50%", class_="whisker")
    dot = tag("circle", cx=percent(scale.at(row.value)), cy="50%", r=4, class_=f"stage {row.method}")
    label = f"{plain(row.value)} {span(row.interval)}"
    return tag("svg", bar, dot, class_="mini", role="img", aria_label=label, data_tip=label)


def heat(routed: Sequence[RoutedUser]) -> Figure | None:
    """Draw a heat map of mean gates: experts as rows, users as columns ordered by their main expert."""
    if not routed:
        return None
    ordered = sorted(routed, key=lambda user: (user.main, -user.gates[user.main], user.user))
    users, experts = _thin(ordered, MOST_COLUMNS), max(len(user.gates) for user in routed)
    low, high = (pick(gate for user in users for gate in user.gates) for pick in (min, max))
    wide, tall = 100 / len(users), 100 / experts
    cells = [
        _cell(user, row, column * wide, row * tall, wide, tall, (low, high))
        for column, user in enumerate(users)
        for row in range(experts)
    ]
    for column in range(1, len(users)):
        if users[column].main != users[column - 1].main:
            x = percent(column * wide)
            cells.append(tag("line", x1=x, x2=x, y1="0", y2="100%", class_="border"))
    for row in range(experts):
        cells.append(symbol(row, "-12", 100 - (row + 0.5) * tall))
        cells.append(tag("text", str(row), x="-26", y=percent((row + 0.5) * tall), dy="4", class_="tick end"))
    label = f"Mean gates of {len(users)} users over {experts} experts"
    plot = tag("svg", *cells, role="img", aria_label=label, height=max(120, 34 * experts), class_="drawing heat")
    scale = tag("span", f"gate {plain(low, 2)}", tag("i", class_="ramp"), plain(high, 2), class_="key")
    above, below = (
        tag("p", "expert", class_="axis up"),
        tag("p", "users, ordered by main expert →", class_="axis across"),
    )
    drawing = tag("div", above, plot, below, scale, class_="plot left")
    caption = f"One column a user, one row an expert, stronger colour more of it. {_shown(users, routed)}"
    caption += (
        "Blocks along the diagonal: users who share a mixture of their own. Columns all alike: nobody is routed apart."
    )
    return Figure("Users and experts", drawing, caption)


def _cell(
    user: RoutedUser, row: int, x: float, y: float, wide: float, tall: float, ends: tuple[float, float]
) -> Markup:
    gate = user.gates[row] if row < len(user.gates) else 0.0
    tip = f"user {user.user}\nexpert {row}: {plain(gate)}\nmain expert {user.main}"
    tip += "" if user.history is None else f"\nhistory {plural(user.history, 'item')}"
    share = (gate - ends[0]) / (ends[1] - ends[0]) if ends[1] > ends[0] else 0.5
    # Slightly wider than its column, so that no gap shows between neighbours.
    box = {"x": percent(x), "y": percent(y), "width": percent(wide + 0.03), "height": percent(tall - 1)}
    return tag("rect", **box, class_="heatcell", fill_opacity=share, data_tip=tip)


def maps(routed: Sequence[RoutedUser]) -> list[Figure]:
    """Draw 2-D scatter plots of users' embeddings, coloured by main expert and, if known, by true group."""
    known = [user for user in routed if user.place]
    placed = _thin(known, MOST_MARKS)
    if not placed:
        return []
    counts = {index: sum(user.main == index for user in placed) for index in sorted({user.main for user in placed})}
    keys = [key(index, f"expert {index} ({amount})") for index, amount in counts.items()]
    drawing = _scatter(placed, [user.main for user in placed], keys, "coloured by main expert")
    caption = f"One mark a user, close together where their embeddings are alike. {_shown(placed, known)}"
    caption += "Colours in clumps: the router reads the embeddings. Distances are a projection, not a measure."
    figures = [Figure("User embeddings by main expert", drawing, caption)]
    truth = [user for user in placed if user.group is not None]
    if truth:
        groups = sorted({user.group for user in truth if user.group is not None})
        keys = [key(groups.index(group), f"true group {group}") for group in groups]
        drawing = _scatter(truth, [groups.index(user.group or 0) for user in truth], keys, "coloured by true group")
        caption = "The same map with the planted groups, which training never saw."
        figures.append(Figure("The same by true group", drawing, f"{caption} Clumps of one colour: found."))
    return figures


def _scatter(users: Sequence[RoutedUser], colours: Sequence[int], keys: Sequence[Markup], label: str) -> Markup:
    places = [user.place for user in users if user.place]
    across, up = (linear([place[axis] for place in places], pad=0.06) for axis in (0, 1))
    marks = []
    for user, colour in zip(users, colours, strict=True):
        x, y = user.place or (0.0, 0.0)
        tip = f"user {user.user}\nmain expert {user.main} (gate {plain(user.gates[user.main], 2)})"
        tip += "" if user.group is None else f"\ntrue group {user.group}"
        tip += "" if user.history is None else f"\nhistory {plural(user.history, 'item')}"
        marks.append(symbol(colour, across.at(x), up.at(y), tip))
    frame = tag("rect", x="0", y="0", width="100%", height="100%", class_="frame")
    plot = chart(frame, *marks, height=300, label=f"Map of {len(users)} user embeddings, {label}")
    return join([plot, tag("p", *keys, class_="keys")])


def gains(users: Sequence[UserGain], step: str, metric: str) -> Figure | None:
    """Draw each user's gain by one step, largest first, with the length of their history below."""
    known = [(user, gain) for user in users if (gain := gain_of(user, step)) is not None]
    if not known:
        return None
    known.sort(key=lambda pair: (-pair[1], -pair[0].history, pair[0].user))
    shown = _thin(known, MOST_COLUMNS)
    before = {"groups": "population", "users": "groups"}[step]
    up = linear([0.0, *(gain for _, gain in shown)], ticks=4, pad=0.04)
    down = logarithmic([max(1, user.history) for user, _ in shown])
    wide = 100 / len(shown)
    bars = [_bar(pair, index * wide, wide, up) for index, pair in enumerate(shown)]
    dots = [_history_dot(pair, (index + 0.5) * wide, down) for index, pair in enumerate(shown)]
    what = f"gain in {metric_name(metric)}, {method_name(step).lower()} over {before} (up is better)"
    top = chart(join(bars), height=190, label=what, y=Axis(up, what))
    history = Axis(down, "history (items, logarithmic), same users in the same order")
    bottom = chart(join(dots), height=100, label="history length of the same users", y=history)
    caption = f"One bar a user, largest gain first. {_shown(shown, known)}Blue gained, orange lost, grey is level. "
    caption += "If history decided who gains, the dots would fall from left to right. Rings: no adapter of their own."
    return Figure(f"{method_name(before)} → {method_name(step)}", join([top, bottom]), caption)


def _user_tip(user: UserGain, gain: float) -> str:
    queries = "" if user.queries is None else f"\n{plural(user.queries, 'query')}"
    return f"user {user.user}\ngain {signed(gain)}\nhistory {plural(user.history, 'item')}{queries}\ntier {user.tier}"


def _bar(pair: tuple[UserGain, float], x: float, wide: float, up: Scale) -> Markup:
    user, gain = pair
    kind = "gain" if gain > 0 else "loss" if gain < 0 else "same"
    top, bottom = max(up.at(gain), up.at(0.0)), min(up.at(gain), up.at(0.0))
    box = {"x": percent(x + wide * 0.1), "width": percent(wide * 0.8)}
    bar = tag("rect", **box, y=percent(100 - top), height=percent(max(top - bottom, 0.8)), class_=f"bar {kind}")
    reach = tag("rect", x=percent(x), y="0", width=percent(wide), height="100%", class_="band")
    return tag("g", bar, reach, data_tip=_user_tip(user, gain))


def _history_dot(pair: tuple[UserGain, float], x: float, down: Scale) -> Markup:
    user, gain = pair
    kind = "gain" if gain > 0 else "loss" if gain < 0 else "same"
    ring = " ring" if user.tier in {"population", "groups"} else ""
    y = percent(100 - down.at(max(1, user.history)))
    return tag("circle", cx=percent(x), cy=y, r=3.5, class_=f"dot {kind}{ring}", data_tip=_user_tip(user, gain))


def _thin(values: Sequence[Item], most: int) -> list[Item]:
    """Return at most `most` values, evenly spaced."""
    if len(values) <= most:
        return list(values)
    return [values[index * len(values) // most] for index in range(most)]


def _shown(shown: Sequence[object], of: Sequence[object]) -> str:
    return f"{len(shown):,} of {len(of):,} are drawn, evenly spaced. " if len(shown) < len(of) else ""
