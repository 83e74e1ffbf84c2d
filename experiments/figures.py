"""Two figures as SVG files of their own: values with intervals by method, and curves. Light and dark by media query.

Knows nothing about questions or files.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from proper.reports.svg import Scale, linear, logarithmic, tag, tick_text

WIDE, LEFT, ROW = 720, 250, 26
STYLE = """
text{font:13px system-ui,sans-serif;fill:#333}.quiet{fill:#777}.head{font-weight:600}.grid{stroke:#ddd}
.bar{stroke:#4269a6;stroke-width:2}.dot{fill:#4269a6}.main .bar{stroke:#b5541c}.main .dot{fill:#b5541c}
path{fill:none;stroke-width:2}
@media(prefers-color-scheme:dark){text{fill:#ddd}.quiet{fill:#999}.grid{stroke:#444}.bar{stroke:#8fb3e8}
.dot{fill:#8fb3e8}.main .bar{stroke:#f0a36b}.main .dot{fill:#f0a36b}}
"""
COLOURS = ("#4269a6", "#b5541c", "#3f8f5f", "#8a5fb0", "#a08220", "#5b8a94", "#b04a70")


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
    """A method's values along x, with intervals."""

    name: str
    points: Sequence[tuple[float, float, float, float]]


def intervals(panels: Sequence[Panel], label: str) -> str:
    """Draw panels under each other, each on a scale of its own: a dot and a 95 % interval a method."""
    parts: list[str] = []
    top = 8
    for panel in panels:
        scale = linear([edge for row in panel.rows for edge in (row.value, row.low, row.high)])
        tall = ROW * len(panel.rows)
        parts.append(tag("text", panel.title, x=8, y=top + 14, class_="head"))
        top += 26
        for tick in scale.ticks:
            x = _across(scale, tick)
            parts.append(tag("line", x1=x, x2=x, y1=top, y2=top + tall, class_="grid"))
            name = tick_text(tick, scale.ticks)
            parts.append(tag("text", name, x=x, y=top + tall + 16, text_anchor="middle", class_="quiet"))
        for place, row in enumerate(panel.rows):
            parts.append(_row(row, scale, top + (place + 0.5) * ROW))
        top += tall + 34
    return _page(parts, top, label)


def _row(row: Row, scale: Scale, y: float) -> str:
    low, high = _across(scale, row.low), _across(scale, row.high)
    bar = tag("line", x1=low, x2=high, y1=y, y2=y, class_="bar")
    dot = tag("circle", cx=_across(scale, row.value), cy=y, r=4.5, class_="dot")
    name = tag("text", row.name, x=LEFT - 12, y=y + 4, text_anchor="end")
    return tag("g", bar, dot, name, class_="main" if row.main else None)


def curves(lines: Sequence[Line], across: str, up: str, label: str) -> str:
    """Draw lines over a logarithmic axis, with an interval at each point; names stand in a legend on the left."""
    x = logarithmic([point[0] for line in lines for point in line.points])
    y = linear([edge for line in lines for _, *edges in line.points for edge in edges])
    tall, top = 300, 34
    parts: list[str] = [tag("text", up, x=8, y=18, class_="head")]
    for tick in y.ticks:
        at = top + tall * (1 - y.at(tick) / 100)
        parts.append(tag("line", x1=LEFT, x2=WIDE - 16, y1=at, y2=at, class_="grid"))
        parts.append(tag("text", tick_text(tick, y.ticks), x=LEFT - 8, y=at + 4, text_anchor="end", class_="quiet"))
    for tick in sorted({point[0] for line in lines for point in line.points}):
        parts.append(tag("text", f"{tick:g}", x=_across(x, tick), y=top + tall + 18, text_anchor="middle"))
    for place, line in enumerate(lines):
        parts += _line(line, place, len(lines), (x, y), (top, tall))
    parts.append(tag("text", across, x=(LEFT + WIDE) / 2, y=top + tall + 38, text_anchor="middle", class_="quiet"))
    return _page(parts, top + tall + 50, label)


def _line(line: Line, place: int, many: int, scales: tuple[Scale, Scale], box: tuple[int, int]) -> list[str]:
    (x, y), (top, tall) = scales, box
    colour = COLOURS[place % len(COLOURS)]
    aside = 5.0 * (place - (many - 1) / 2)  # Intervals of one x would lie on each other.

    def at(value: float) -> float:
        return top + tall * (1 - y.at(value) / 100)

    spots = [(_across(x, point[0]) + aside, *map(at, point[1:])) for point in line.points]
    steps = " ".join(f"{'L' if index else 'M'}{left:.1f} {value:.1f}" for index, (left, value, *_) in enumerate(spots))
    parts: list[str] = [tag("path", d=steps, stroke=colour)]
    for left, value, low, high in spots:
        parts.append(tag("line", x1=left, x2=left, y1=low, y2=high, stroke=colour, stroke_opacity=0.5))
        parts.append(tag("circle", cx=left, cy=value, r=4.0, fill=colour))
    mark = tag("circle", cx=16, cy=top + 8 + 22 * place, r=5, fill=colour)
    return [*parts, mark, tag("text", line.name, x=28, y=top + 12 + 22 * place)]


def _across(scale: Scale, value: float) -> float:
    return LEFT + (WIDE - 24 - LEFT) * scale.at(value) / 100


def _page(parts: Sequence[str], tall: float, label: str) -> str:
    style = f"<style>{STYLE.strip()}</style>"
    opening = (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDE} {tall:.0f}" role="img" aria-label="{label}">'
    )
    return "\n".join([opening, style, *parts, "</svg>"]) + "\n"
