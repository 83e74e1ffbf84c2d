"""Learning curves of each stage as inline SVG."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import fmean

from markupsafe import Markup

from proper.reports.figures import Figure
from proper.reports.formats import plain, plural
from proper.reports.load import CurvePoint
from proper.reports.svg import Axis, Scale, chart, join, linear, path, percent, tag

BANDS = 60
STAGES = {
    "population": "1 · Population",
    "groups": "2 · Groups",
    "users": "3a · Users",
    "router": "3b · LoRA-aware router",
}


def curves(stages: dict[str, list[CurvePoint]]) -> list[Figure]:
    """Draw each stage's training loss, phase by phase, and the constraint loss if it was logged."""
    order = list(STAGES)
    known = [name for name in stages if name.partition(":")[0] in STAGES]
    known.sort(key=lambda name: order.index(name.partition(":")[0]))
    figures = []
    for name in [*known, *(name for name in stages if name not in known)]:
        stage, _, phase = name.partition(":")
        title = f"{STAGES.get(stage, stage)}{f',{phase}' if phase else ''}"
        figures.append(_loss(title, stage, stages[name]))
        figures += _constraint(title, stages[name])
    return figures


def _loss(title: str, stage: str, points: Sequence[CurvePoint]) -> Figure:
    losses = [(point, point.loss) for point in points]
    seeds = [[point.loss for point in points if point.seed == seed] for seed in sorted({p.seed for p in points})]
    first = fmean(fmean(line[: max(1, len(line) // 10)]) for line in seeds)
    last = fmean(fmean(line[-max(1, len(line) // 10) :]) for line in seeds)
    steps = plural(max(map(len, seeds)), "step") + (f" of each of {len(seeds)} seeds" if len(seeds) > 1 else "")
    caption = f"{plain(first)} in the first tenth, {plain(last)} in the last, over {steps}."
    if stage == "users":
        caption += " Users take turns, so a step mixes people who have just begun with others who are nearly done."
    return Figure(title, _curve(losses, "loss (nats per answer token)", title), caption)


def _constraint(title: str, points: Sequence[CurvePoint]) -> list[Figure]:
    """Draw the constraint loss or, if only that was logged, its weighted contribution to the loss."""
    held = [(point, point.constraint) for point in points if point.constraint is not None]
    if held:
        caption = "Lower: different users use more different mixtures."
        return [Figure(f"{title}: constraint", _curve(held, "constraint loss", title), caption)]
    added = [(point, point.penalty) for point in points if point.penalty]
    if not added:
        return []
    caption = "What the constraint adds to the loss: it rises while its weight warms up, and falls as users part."
    return [Figure(f"{title}: constraint", _curve(added, "constraint loss × weight", title), caption)]


def _curve(values: Sequence[tuple[CurvePoint, float]], title: str, name: str) -> Markup:
    seeds = sorted({point.seed for point, _ in values})
    lines = {seed: _binned([(p.step, v) for p, v in values if p.seed == seed]) for seed in seeds}
    means = {seed: _smooth([value for _, value in line]) for seed, line in lines.items()}
    across = _whole_steps([step for line in lines.values() for step, _ in line])
    up = linear([value for line in lines.values() for _, value in line])
    marks = []
    for line in lines.values():
        marks.append(path([(across.at(step), up.at(value)) for step, value in line], "raw"))
    for seed, line in lines.items():
        smooth = [(across.at(step), up.at(value)) for (step, _), value in zip(line, means[seed], strict=True)]
        marks.append(path(smooth, "line"))
    marks.append(_bands(values, across, title.split(" (")[0]))
    steps = f"step{f' (one line for each of {len(seeds)} seeds)' if len(seeds) > 1 else ''}"
    label = f"{title} in training, {name}"
    return chart(join(marks), height=170, label=label, x=Axis(across, steps), y=Axis(up, title))


def _whole_steps(steps: Sequence[float]) -> Scale:
    """Return a scale without margins whose ticks are whole numbers."""
    inside = linear(steps, ticks=3, pad=0.0)
    low, high = min(steps), max(steps)
    if low == high:
        return inside
    return Scale(low, high, tuple(tick for tick in inside.ticks if low <= tick <= high and tick == round(tick)))


def _binned(line: Sequence[tuple[int, float]], most: int = 240) -> list[tuple[float, float]]:
    """Return at most `most` points, each the mean of its neighbours."""
    wide = -(-len(line) // most)
    pieces = [line[start : start + wide] for start in range(0, len(line), wide)]
    return [(fmean(step for step, _ in piece), fmean(value for _, value in piece)) for piece in pieces]


def _smooth(values: Sequence[float]) -> list[float]:
    """Return running means over a window of a fifteenth of the line, centred and shortened at the ends."""
    reach = max(1, len(values) // 30)
    return [fmean(values[max(0, i - reach) : i + reach + 1]) for i in range(len(values))]


def _bands(values: Sequence[tuple[CurvePoint, float]], across: Scale, what: str) -> Markup:
    """Return invisible columns over a plot whose hover tips show the values at that step."""
    columns: dict[int, list[tuple[CurvePoint, float]]] = {}
    for point, value in values:
        columns.setdefault(min(BANDS - 1, int(across.at(point.step) * BANDS / 100)), []).append((point, value))
    marks = []
    for column, inside in sorted(columns.items()):
        point = inside[0][0]
        tip = f"from step {point.step}\n{what} {plain(fmean(value for _, value in inside))}"
        tip += "" if point.epoch is None else f"\nepoch {plain(point.epoch, 2)}"
        tip += "" if point.learning_rate is None else f"\nlearning rate {point.learning_rate:.2g}"
        wide = percent(100 / BANDS)
        marks.append(
            tag("rect", x=percent(column * 100 / BANDS), y="0", width=wide, height="100%", class_="band", data_tip=tip)
        )
    return join(marks)
