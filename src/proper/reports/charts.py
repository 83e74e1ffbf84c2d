"""Charts as static SVG, drawn with matplotlib: one palette for light and dark mode, tooltips, selectable text.

matplotlib is imported when the first chart is drawn, and its global settings stay as they are. A chart draws with the
light colours of `svg.PALETTE`; in the SVG each becomes a CSS variable, which is set for both modes.
"""

from __future__ import annotations

import io
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from markupsafe import Markup

from proper.reports.svg import PALETTE, for_file, for_page

if TYPE_CHECKING:
    from matplotlib.artist import Artist
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

CATEGORIES = 8
MARKERS = {"o": 1.0, "s": 0.9, "^": 1.3, "D": 0.8, "v": 1.3, "P": 1.4, "*": 1.9}
"""matplotlib's markers by category, with the factor of area that makes them look equally large."""
GLYPHS = "●■▲◆▼✚★"

TITLE = 26
"""Pixels above a plot for the title of the vertical axis."""
NAMES = 46
"""Pixels below a plot for category names of two lines."""
TICKS = 40
"""Pixels below a plot for tick labels and the title of the horizontal axis."""

_STYLE: dict[str, Any] = {
    "svg.fonttype": "none",
    "text.parse_math": False,
    "font.size": 12,
    "figure.dpi": 72,
    "axes.spines.left": False,
    "axes.spines.right": False,
    "axes.spines.top": False,
    "axes.spines.bottom": False,
    "axes.grid": True,
    "axes.grid.axis": "y",
    "axes.axisbelow": True,
    "axes.formatter.useoffset": False,
    "grid.linewidth": 1,
    "xtick.major.size": 0,
    "ytick.major.size": 0,
    "xtick.major.pad": 8,
    "ytick.major.pad": 8,
}


@dataclass(frozen=True, slots=True)
class Chart:
    """A drawing with its title and an explanatory caption."""

    title: str
    drawing: Markup
    caption: str


@dataclass(slots=True)
class Canvas:
    """A chart in the making: its panels from top to bottom.

    After the `with` block, `svg` is the drawing for a page and `file` the text of an SVG file.
    """

    figure: Figure
    label: str
    panels: list[Axes] = field(default_factory=list)
    raw: str = ""
    tooltips: dict[str, tuple[Sequence[str], str]] = field(default_factory=dict)

    @property
    def axes(self) -> Axes:
        """The first panel."""
        return self.panels[0]

    @property
    def svg(self) -> Markup:
        """The drawing as an element of a page."""
        return for_page(self.raw, self.label, self.tooltips)

    @property
    def file(self) -> str:
        """The drawing as the text of an SVG file."""
        return for_file(self.raw, self.label, self.tooltips)

    def tips(self, artist: Artist, tips: Sequence[str], css: str) -> None:
        """Give an artist's marks a CSS class and, in the order in which it draws them, tooltips (or none)."""
        name = f"tips{len(self.tooltips)}"
        artist.set_gid(name)
        self.tooltips[name] = (tips, css)

    def bands(self, axes: Axes, spans: Sequence[tuple[float, float]], tips: Sequence[str]) -> None:
        """Lay invisible columns over a plot, which show a tooltip and light up under the pointer."""
        from matplotlib.collections import PolyCollection

        corners = [[(low, 0.0), (high, 0.0), (high, 1.0), (low, 1.0)] for low, high in spans]
        bands = PolyCollection(corners, transform=axes.get_xaxis_transform(), facecolor=color("ink"))
        axes.add_collection(bands, autolim=False)
        self.tips(bands, tips, "band")


@contextmanager
def canvas(label: str, width: int, *plots: tuple[int, int], left: int = 46, top: int = TITLE) -> Iterator[Canvas]:
    """Open a chart, and render it at the end of the block.

    Args:
        label: the text for screen readers; two charts of one page should not share it.
        width: pixels at full size; a page may scale the chart.
        plots: (height, room below) of every panel in pixels, from top to bottom.
        left: pixels for the labels of the vertical axis.
        top: pixels above each panel.
    """
    import matplotlib
    from matplotlib.figure import Figure

    height = sum(top + plot + below for plot, below in plots)
    style: Any = {**_STYLE, **_colors(), "svg.hashsalt": label}
    with matplotlib.rc_context(style), warnings.catch_warnings():
        # The browser has fonts for scripts that matplotlib's own font lacks.
        warnings.filterwarnings("ignore", message="Glyph .* missing from")
        drawing = Canvas(Figure(figsize=(width / 72, height / 72)), label)
        drawing.figure.patch.set_visible(False)
        edge = height
        for plot, below in plots:
            edge -= top + plot
            box = (left / width, edge / height, (width - left - 8) / width, plot / height)
            axes = drawing.figure.add_axes(box)
            axes.patch.set_visible(False)
            drawing.panels.append(axes)
            edge -= below
        yield drawing
        text = io.StringIO()
        drawing.figure.savefig(text, format="svg", metadata={"Date": None})
    drawing.raw = text.getvalue()


def color(name: str | int) -> str:
    """Return the light colour of a palette's name or of a category's number."""
    return PALETTE[name if isinstance(name, str) else f"c{name % CATEGORIES}"][0]


def marker(index: int) -> str:
    """Return matplotlib's marker of category `index`; with 8 colours, 56 categories look different."""
    return list(MARKERS)[index % len(MARKERS)]


def key(index: int, label: str) -> Markup:
    """Return a legend's entry for category `index`: the mark in its colour, and the label."""
    glyph = GLYPHS[index % len(GLYPHS)]
    style = f"color:var(--c{index % CATEGORIES})"
    return Markup('<span class="key"><i style="{}" aria-hidden="true">{}</i>{}</span>').format(style, glyph, label)


def keys(labels: Sequence[tuple[int, str]]) -> Markup:
    """Return a legend below a chart."""
    return Markup('<p class="keys">{}</p>').format(Markup("").join(key(index, label) for index, label in labels))


def titles(axes: Axes, up: str = "", across: str = "") -> None:
    """Write the title of the vertical axis above the plot, and that of the horizontal axis below its right end."""
    style: dict[str, Any] = {"textcoords": "offset points", "color": color("soft")}
    if up:
        axes.annotate(up, (0, 1), (0, 12), xycoords=("figure fraction", "axes fraction"), **style)
    if across:
        axes.annotate(across, (1, 0), (0, -36), xycoords="axes fraction", ha="right", **style)


def names(axes: Axes, columns: Sequence[tuple[str, str]]) -> None:
    """Write a bold name and a second line below each column; column `i` is at x = i."""
    axes.set_xticks([])
    axes.set_xlim(-0.5, len(columns) - 0.5)
    style: dict[str, Any] = {"xycoords": ("data", "axes fraction"), "textcoords": "offset points", "ha": "center"}
    for at, (name, below) in enumerate(columns):
        axes.annotate(name, (at, 0), (0, -20), size=13, weight="bold", gid="name", **style)
        if below:
            axes.annotate(below, (at, 0), (0, -36), color=color("soft"), **style)


def value_axis(axes: Axes, pad: float = 0.08, ticks: int = 5, integer: bool = False, across: bool = False) -> None:
    """Give an axis round ticks, a margin of `pad` of its range, and a darker line at 0 if 0 is in its range."""
    from matplotlib.ticker import MaxNLocator

    axis = axes.xaxis if across else axes.yaxis
    axis.set_major_locator(MaxNLocator(ticks, steps=[1, 2, 2.5, 5, 10], integer=integer))
    axes.margins(x=pad if across else None, y=None if across else pad)
    low, high = axes.get_xlim() if across else axes.get_ylim()
    if low <= 0 <= high:
        line = axes.axvline if across else axes.axhline
        line(0, color=color("same"), linewidth=1, zorder=0.9)


def log_axis(axes: Axes, values: Sequence[float], across: bool = False) -> list[float]:
    """Make an axis logarithmic around positive `values`, with at most about five of the ticks 1, 2, 5, 10, ...

    Returns the ticks; the labels are left to the caller.
    """
    from matplotlib.ticker import MaxNLocator, NullLocator

    low, high = min(values) * 0.85, max(values) * 1.15
    every = [factor * 10.0**power for power in range(-3, 16) for factor in (1, 2, 5)]
    inside = [tick for tick in every if low <= tick <= high]
    if len(inside) < 2:  # a narrow range, such as 14 to 25
        inside = [float(tick) for tick in MaxNLocator(3).tick_values(low, high) if low <= tick <= high]
    ticks = inside if len(inside) <= 5 else inside[::2] if len(inside) <= 8 else inside[::3]
    (axes.set_xscale if across else axes.set_yscale)("log")
    (axes.set_xlim if across else axes.set_ylim)(low, high)
    axis = axes.xaxis if across else axes.yaxis
    axis.set_minor_locator(NullLocator())
    axis.set_ticks(ticks, [f"{tick:,.0f}" if tick >= 1 else f"{tick:g}" for tick in ticks])
    return ticks


def whiskers(
    drawing: Canvas,
    spots: Sequence[float],
    rows: Sequence[tuple[float, tuple[float, float] | None]],
    tips: Sequence[str],
    hue: str | int,
    size: float = 30,
    shape: str = "o",
    across: bool = False,
    panel: int = 0,
) -> None:
    """Draw values with their intervals in a panel: a mark, a bar where there is an interval, and a tooltip."""
    axes, known = drawing.panels[panel], [at for at, (_, interval) in enumerate(rows) if interval]
    ends = [rows[at][1] or (0.0, 0.0) for at in known]
    if known:
        bar = axes.hlines if across else axes.vlines
        bars = bar(
            [spots[at] for at in known],
            [low for low, _ in ends],
            [high for _, high in ends],
            colors=color(hue),
            linewidth=3,
            alpha=0.45,
            capstyle="round",
        )
        drawing.tips(bars, [tips[at] for at in known], "interval")
    values = [value for value, _ in rows]
    x, y = (values, spots) if across else (spots, values)
    look: dict[str, Any] = {"color": color(hue), "edgecolor": color("card"), "linewidth": 0.8, "zorder": 3}
    marks = axes.scatter(x, y, size * MARKERS[shape], marker=shape, **look)
    drawing.tips(marks, tips, "mark")


def _colors() -> dict[str, str]:
    keys = {"ink": ("text.color",), "soft": ("xtick.color", "ytick.color"), "grid": ("grid.color",)}
    keys["line"] = ("axes.edgecolor",)
    return {key: color(name) for name, inside in keys.items() for key in inside}
