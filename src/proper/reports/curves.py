"""Curves of the report: loss against training step, and the main metric against history length.

The values against history length are also in the report's table of slices.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import TYPE_CHECKING

from proper.reports import charts
from proper.reports.charts import NAMES, TICKS, Chart, canvas, color
from proper.reports.formats import method_name, metric_name, of_task, plain, plural, signed, span
from proper.reports.load import CurvePoint, RunFiles
from proper.reports.narrative import primary_metrics
from proper.reports.reading import count, interval, number
from proper.run_folder import STAGE_METHODS

if TYPE_CHECKING:
    from markupsafe import Markup

BANDS = 60
MAX_POINTS = 240
STAGES = {
    "population": "1 · Population",
    "groups": "2 · Groups",
    "users": "3a · Users",
    "router": "3b · LoRA-aware router",
}
QUARTERS = ("history-q1", "history-q2", "history-q3", "history-q4")
SHORT = {"under-10": "under 10", "bottom-100": "shortest 100"}
GREY = 7

Line = Sequence[tuple[float, float]]


def curves(stages: dict[str, list[CurvePoint]]) -> list[Chart]:
    """Draw each stage's training loss, phase by phase, and the constraint loss if it was logged."""
    order = list(STAGES)
    known = [name for name in stages if name.partition(":")[0] in STAGES]
    known.sort(key=lambda name: order.index(name.partition(":")[0]))
    found = []
    for name in [*known, *(name for name in stages if name not in known)]:
        stage, _, phase = name.partition(":")
        title = f"{STAGES.get(stage, stage)}{f',{phase}' if phase else ''}"
        found.append(_loss(title, stage, stages[name]))
        found += _constraint(title, stages[name])
    return found


def _loss(title: str, stage: str, points: Sequence[CurvePoint]) -> Chart:
    losses = [(point, point.loss) for point in points]
    seeds = [[point.loss for point in points if point.seed == seed] for seed in sorted({p.seed for p in points})]
    first = fmean(fmean(line[: max(1, len(line) // 10)]) for line in seeds)
    last = fmean(fmean(line[-max(1, len(line) // 10) :]) for line in seeds)
    steps = plural(max(map(len, seeds)), "step") + (f" of each of {len(seeds)} seeds" if len(seeds) > 1 else "")
    caption = f"{plain(first)} in the first tenth, {plain(last)} in the last, over {steps}."
    if stage == "users":
        caption += " The trainer holds some users at a time, so a step mixes users that have just started with others "
        caption += "that are nearly done."
    return Chart(title, _curve(losses, title, "loss (nats per answer token)"), caption)


def _constraint(title: str, points: Sequence[CurvePoint]) -> list[Chart]:
    """Draw the constraint loss or, if only that was logged, its weighted contribution to the loss."""
    losses = [(point, point.constraint) for point in points if point.constraint is not None]
    if losses:
        caption = "Lower: mixtures of different users differ more."
        return [Chart(f"{title}: constraint", _curve(losses, title, "constraint loss"), caption)]
    added = [(point, point.penalty) for point in points if point.penalty]
    if not added:
        return []
    caption = "What the constraint adds to the loss: it rises while its weight warms up, and falls as mixtures of "
    caption += "different users diverge."
    return [Chart(f"{title}: constraint", _curve(added, title, "constraint loss × weight"), caption)]


def _curve(values: Sequence[tuple[CurvePoint, float]], title: str, what: str) -> Markup:
    seeds = sorted({point.seed for point, _ in values})
    lines = [_binned([(point.step, value) for point, value in values if point.seed == seed]) for seed in seeds]
    with canvas(f"{title} in training, {what}", 290, (130, TICKS)) as drawing:
        axes = drawing.axes
        for line in lines:
            steps, raw = zip(*line, strict=True)
            axes.plot(steps, raw, color=color("accent"), linewidth=1, alpha=0.3)
            axes.plot(steps, _smooth(raw), color=color("accent"), linewidth=2, gid="line")
        axes.set_xlim(*_ends([step for line in lines for step, _ in line]))
        _bands(drawing, values, what.partition(" (")[0])
        charts.value_axis(axes)
        charts.value_axis(axes, pad=0.0, ticks=3, integer=True, across=True)
        seeds_note = f" (one line for each of {len(seeds)} seeds)" if len(seeds) > 1 else ""
        charts.titles(axes, what, f"step{seeds_note}")
    return drawing.svg


def _ends(steps: Sequence[float]) -> tuple[float, float]:
    low, high = min(steps), max(steps)
    return (low, high) if low < high else (low - 1, high + 1)


def _binned(line: Sequence[tuple[int, float]]) -> list[tuple[float, float]]:
    """Return at most `MAX_POINTS` points, each the mean of its neighbours."""
    wide = -(-len(line) // MAX_POINTS)
    pieces = [line[start : start + wide] for start in range(0, len(line), wide)]
    return [(fmean(step for step, _ in piece), fmean(value for _, value in piece)) for piece in pieces]


def _smooth(values: Sequence[float]) -> list[float]:
    """Return running means over a window of a fifteenth of the line, centred and shortened at the ends."""
    reach = max(1, len(values) // 30)
    return [fmean(values[max(0, i - reach) : i + reach + 1]) for i in range(len(values))]


def _bands(drawing: charts.Canvas, values: Sequence[tuple[CurvePoint, float]], what: str) -> None:
    """Lay columns over a plot whose tooltips show the values at that step."""
    low, high = drawing.axes.get_xlim()
    wide = (high - low) / BANDS
    columns: dict[int, list[tuple[CurvePoint, float]]] = {}
    for point, value in values:
        columns.setdefault(min(BANDS - 1, int((point.step - low) / wide)), []).append((point, value))
    tips = []
    for _, inside in sorted(columns.items()):
        point = inside[0][0]
        tip = f"from step {point.step}\n{what} {plain(fmean(value for _, value in inside))}"
        tip += "" if point.epoch is None else f"\nepoch {plain(point.epoch, 2)}"
        tips.append(tip + ("" if point.learning_rate is None else f"\nlearning rate {point.learning_rate:.2g}"))
    drawing.bands(drawing.axes, [(low + at * wide, low + (at + 1) * wide) for at in sorted(columns)], tips)


@dataclass(frozen=True, slots=True)
class HistorySlice:
    """One slice: its name in results.json, shortest and longest history, number of users, and scores by method.

    A score is a value with its 95 % interval.
    """

    name: str
    reach: tuple[float, float] | None
    users: int
    scores: Mapping[str, tuple[float, tuple[float, float] | None]]

    @property
    def title(self) -> str:
        """The slice's name on a chart."""
        return f"Q{QUARTERS.index(self.name) + 1}" if self.name in QUARTERS else SHORT[self.name]

    @property
    def lengths(self) -> str:
        """The range of history lengths, short enough for a phone screen."""
        if self.reach is None:
            return ""
        low, high = (f"{edge:.0f}" for edge in self.reach)
        return low if low == high else f"{low}–{high}"


def history_curves(run: RunFiles) -> list[Chart]:
    """Draw the stages together, then each other method against the last stage; nothing with fewer than two slices."""
    rows = primary_metrics(run) if run.metrics else []
    if not rows:
        return []
    metric, higher = rows[0].metric, rows[0].higher_is_better
    slices = _slices(run, metric)
    methods = list(dict.fromkeys(method for part in slices for method in part.scores))
    if sum(part.name in QUARTERS for part in slices) < 2 or not methods:
        return []
    stages = [stage for stage in STAGE_METHODS[1:] if stage in methods] or methods[:1]
    shared = _edges(slices, [method for method in methods if method != "base"] or methods)
    title = f"{metric_name(metric)} ({'higher' if higher else 'lower'} is better)"
    whole = of_task(run.first_task, "Against history length")
    found = [Chart(whole, _draw(slices, stages, shared, title), _caption(slices, stages))]
    for method in (method for method in methods if method not in stages):
        # The bare backbone scores far from all other methods; on their scale its panel would be empty.
        edges = _edges(slices, [method, stages[-1]]) if method == "base" else shared
        drawing = _draw(slices, [method, stages[-1]], edges, "", {stages[-1]: GREY})
        found.append(Chart(method_name(method), drawing, _gap(slices, method, stages[-1])))
    return found


def _slices(run: RunFiles, metric: str) -> list[HistorySlice]:
    """Return the slices by history length, shortest first, without slices that contain all users."""
    known = {name: [row for row in run.rows("slices") if row.get("slice") == name] for name in (*QUARTERS, *SHORT)}
    all_users = count(run.part("task").get("target_users"))
    slices = []
    for name, rows in known.items():
        scores = {
            str(row.get("method")): (value, interval(row.get("ci95")))
            for row in rows
            if row.get("metric") == metric and (value := number(row.get("value"))) is not None
        }
        users = next((count(row.get("users")) or 0 for row in rows), 0)
        if scores and not (name in SHORT and users == all_users):
            slices.append(HistorySlice(name, interval(rows[0].get("history")), users, scores))
    return slices


def _edges(slices: Sequence[HistorySlice], methods: Sequence[str]) -> list[float]:
    scores = [part.scores[method] for part in slices for method in methods if method in part.scores]
    return [edge for value, ends in scores for edge in (value, *(ends or ()))]


def _draw(
    slices: Sequence[HistorySlice],
    methods: Sequence[str],
    edges: Sequence[float],
    title: str,
    hues: Mapping[str, int] | None = None,
) -> Markup:
    """Draw methods over the slices, side by side in a column so that intervals do not overlap."""
    hue = {method: (hues or {}).get(method, index) for index, method in enumerate(methods)}
    width, height, top = (560, 230, charts.TITLE) if title else (400, 130, 8)
    with canvas(
        f"{', '.join(map(method_name, methods))} by history length", width, (height, NAMES), top=top
    ) as drawing:
        axes = drawing.axes
        for index, method in enumerate(methods):
            shift = (index - (len(methods) - 1) / 2) * 0.56 / len(methods)
            spots = [(at + shift, part) for at, part in enumerate(slices) if method in part.scores]
            quarters = [(x, part.scores[method][0]) for x, part in spots if part.name in QUARTERS]
            axes.plot(*zip(*quarters, strict=True), color=color(hue[method]), linewidth=2, alpha=0.75, gid="line")
            scores = [part.scores[method] for _, part in spots]
            tips = [_tip(method, part) for _, part in spots]
            shape = charts.marker(hue[method])
            charts.whiskers(drawing, [x for x, _ in spots], scores, tips, hue[method], 64, shape)
        axes.update_datalim([(0, min(edges)), (0, max(edges))])
        axes.autoscale_view()
        charts.names(axes, [(part.title, part.lengths) for part in slices])
        charts.value_axis(axes, pad=0.06)
        charts.titles(axes, title)
    legend = (
        charts.keys([(hue[method], method_name(method)) for method in methods]) if title and len(methods) > 1 else ""
    )
    return drawing.svg + legend


def _tip(method: str, part: HistorySlice) -> str:
    value, ends = part.scores[method]
    tip = f"{method_name(method)}, {part.title}\n{plain(value)}\n95 % {span(ends)}"
    return f"{tip}\n{plural(part.users, 'user')}, {part.lengths} items"


def _caption(slices: Sequence[HistorySlice], stages: Sequence[str]) -> str:
    quarters = [part for part in slices if part.name in QUARTERS]
    counts = ", ".join(str(part.users) for part in quarters)
    text = f"Quarters of the users by history length (items below a column; {counts} users), "
    text += "with 95 % intervals over the users of each. "
    if len(quarters) < len(slices):
        text += "At the right, without a line: the shortest histories. "
    both = [part for part in quarters if {stages[0], stages[-1]} <= set(part.scores)]
    if len(stages) > 1 and both:
        first, last = (part.scores[stages[-1]][0] - part.scores[stages[0]][0] for part in (both[0], both[-1]))
        text += f"{method_name(stages[-1])} minus {method_name(stages[0])}: {signed(first)} in the shortest quarter, "
        text += f"{signed(last)} in the longest; the difference of these two is not tested."
    return text


def _gap(slices: Sequence[HistorySlice], method: str, against: str) -> str:
    quarters = [part for part in slices if part.name in QUARTERS and {method, against} <= set(part.scores)]
    gaps = [signed(part.scores[method][0] - part.scores[against][0]) for part in quarters]
    return f"Minus {method_name(against)} (grey), by quarter: {', '.join(gaps)}." if gaps else ""
