"""Marks, scales and frames for responsive inline SVG.

Horizontal positions are percentages and sizes are pixels, so text and dots keep their size on a phone. Colours are CSS
classes, so one figure serves light and dark mode.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from markupsafe import Markup, escape

COLOURS = 8
SHAPES = (
    "M0-5A5 5 0 1 1 0 5A5 5 0 1 1 0-5Z",
    "M-4.4-4.4H4.4V4.4H-4.4Z",
    "M0-5.6L5.2 4.2H-5.2Z",
    "M0-6L6 0L0 6L-6 0Z",
    "M0 5.6L5.2-4.2H-5.2Z",
    "M-1.9-5.4H1.9V-1.9H5.4V1.9H1.9V5.4H-1.9V1.9H-5.4V-1.9H-1.9Z",
    "M0-6L1.8-1.9L6-1.6L2.8 1.2L3.8 5.4L0 3.1L-3.8 5.4L-2.8 1.2L-6-1.6L-1.8-1.9Z",
)


@dataclass(frozen=True, slots=True)
class Scale:
    """Mapping from a value to a percentage of the axis; `ticks` are round numbers in its range."""

    low: float
    high: float
    ticks: tuple[float, ...]
    log: bool = False

    def at(self, value: float) -> float:
        """Return the position of `value`, 0 at `low` and 100 at `high`, clamped."""
        low, high = (math.log(self.low), math.log(self.high)) if self.log else (self.low, self.high)
        spot = math.log(max(value, self.low)) if self.log else value
        return min(100.0, max(0.0, 100 * (spot - low) / (high - low)))


@dataclass(frozen=True, slots=True)
class Axis:
    """A scale with its title and tick format."""

    scale: Scale
    title: str
    write: Callable[[float], str] | None = None

    def text(self, tick: float) -> str:
        """Return a tick's label: as `write` says, else a number with the decimals that the ticks need."""
        return self.write(tick) if self.write is not None else tick_text(tick, self.scale.ticks)


def linear(values: Sequence[float], ticks: int = 4, pad: float = 0.08) -> Scale:
    """Return a scale around `values` with a margin of `pad` of their range."""
    low, high = min(values), max(values)
    margin = (high - low) * pad if high > low else abs(high) * 0.1 or 1.0
    low, high = low - margin, high + margin
    rough = (high - low) / ticks
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(factor * power for factor in (1, 2, 2.5, 5, 10) if factor * power >= rough * 0.999)
    first, last = math.ceil(low / step), math.floor(high / step)
    return Scale(low, high, tuple(index * step for index in range(first, last + 1)))


def logarithmic(values: Sequence[float]) -> Scale:
    """Return a logarithmic scale around positive `values`."""
    low, high = max(min(values), 1e-9) * 0.85, max(values) * 1.15
    powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    every = [factor * 10.0**power for power in powers for factor in (1, 2, 5)]
    inside = tuple(tick for tick in every if low <= tick <= high)
    return Scale(low, high, inside if len(inside) <= 5 else inside[::2] if len(inside) <= 8 else inside[::3], log=True)


def percent(value: float) -> str:
    """Return a position along an axis as SVG writes it."""
    return f"{value:.2f}%"


def tag(element: str, *inside: str, **attributes: object) -> Markup:
    """Return one element; content and attributes are escaped, `class_` and `data_tip` become `class` and `data-tip`.

    An attribute that is None is left out. Content that is already Markup stays as it is.
    """
    written = [
        Markup(' {}="{}"').format(name.rstrip("_").replace("_", "-"), f"{v:.2f}" if isinstance(v, float) else v)
        for name, v in attributes.items()
        if v is not None
    ]
    return Markup("<{0}{1}>{2}</{0}>").format(element, join(written), join(inside))


def join(parts: Sequence[str]) -> Markup:
    """Return the parts one after the other, each escaped unless it is Markup."""
    return Markup("").join(escape(part) for part in parts)


def path(points: Sequence[tuple[float, float]], class_: str) -> Markup:
    """Return a line through points given in percent (y upwards) whose stroke keeps its width when stretched."""
    steps = " ".join(f"{'L' if index else 'M'}{x:.2f} {100 - y:.2f}" for index, (x, y) in enumerate(points))
    line = tag("path", d=steps, class_=class_)
    return tag("svg", line, viewBox="0 0 100 100", preserveAspectRatio="none", width="100%", height="100%")


def symbol(index: int, x: float | str, y: float, tip: str | None = None) -> Markup:
    """Return the mark of category `index`, by colour and by shape, at percent (x may be a length; y upwards)."""
    mark = tag("use", href=f"#s{index % len(SHAPES)}")
    colour = f"mark c{index % COLOURS}"
    across = x if isinstance(x, str) else percent(x)
    return tag("svg", mark, x=across, y=percent(100 - y), class_=colour, overflow="visible", data_tip=tip)


def key(index: int, label: str) -> Markup:
    """Return a legend's entry for category `index`."""
    shape = tag("use", href=f"#s{index % len(SHAPES)}")
    mark = tag("svg", shape, class_=f"mark c{index % COLOURS}", viewBox="-7 -7 14 14")
    return tag("span", mark, label, class_="key")


def shapes() -> Markup:
    """Return the definitions that `symbol` and `key` refer to; a page must contain them once."""
    drawn = [tag("path", id=f"s{index}", d=shape) for index, shape in enumerate(SHAPES)]
    return tag("svg", tag("defs", *drawn), width="0", height="0", aria_hidden="true", class_="shapes")


def chart(
    *body: str,
    height: int,
    label: str,
    x: Axis | None = None,
    y: Axis | None = None,
    names: Sequence[tuple[float, str, str]] = (),
) -> Markup:
    """Return a framed plot.

    Args:
        body: the marks.
        height: pixels of the plotting area.
        label: text for screen readers.
        x: the horizontal axis, or None.
        y: the vertical axis, or None.
        names: categories instead of an x axis, as (percent, name, second line).
    """
    grid = [*(_y_ticks(y) if y else []), *(_x_ticks(x) if x else [])]
    for spot, name, below in names:
        grid.append(tag("text", name, x=percent(spot), y="100%", dy="20", class_="name"))
        grid.append(tag("text", below, x=percent(spot), y="100%", dy="38", class_="tick mid"))
    drawing = tag("svg", *grid, *body, role="img", aria_label=label, height=height, class_="drawing")
    above = tag("p", y.title, class_="axis up") if y and y.title else ""
    below = tag("p", x.title, class_="axis across") if x and x.title else ""
    kinds = " ".join(["plot", *(["left"] if y else []), *(["named"] if names else ["ticked"] if x else [])])
    return tag("div", above, drawing, below, class_=kinds)


def tick_text(value: float, ticks: Sequence[float]) -> str:
    """Return a tick's label with as many decimals as the step between ticks needs."""
    step = min((b - a for a, b in zip(ticks, ticks[1:], strict=False)), default=abs(value) or 1.0)
    decimals = next((digits for digits in range(6) if abs(step * 10**digits - round(step * 10**digits)) < 1e-6), 6)
    return f"{value + 0.0:,.{decimals}f}".replace("-", "−")


def _y_ticks(axis: Axis) -> list[Markup]:
    drawn = []
    for tick in axis.scale.ticks:
        spot = percent(100 - axis.scale.at(tick))
        zero = " zero" if abs(tick) < 1e-12 else ""
        drawn.append(tag("line", x1="0", x2="100%", y1=spot, y2=spot, class_=f"grid{zero}"))
        drawn.append(tag("text", axis.text(tick), x="-8", y=spot, dy="4", class_="tick end"))
    return drawn


def _x_ticks(axis: Axis) -> list[Markup]:
    drawn = []
    for tick in axis.scale.ticks:
        spot = percent(axis.scale.at(tick))
        drawn.append(tag("text", axis.text(tick), x=spot, y="100%", dy="18", class_="tick mid"))
    return drawn
