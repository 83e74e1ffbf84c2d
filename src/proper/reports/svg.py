"""matplotlib's SVG for a page or a file of its own: accessible, in the colours of CSS variables, with tooltips."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from xml.etree import ElementTree
from xml.etree.ElementTree import Element

from markupsafe import Markup

PALETTE = {
    "ink": ("#1d2126", "#e8eaed"),
    "soft": ("#5c646e", "#a2abb6"),
    "card": ("#fffffe", "#1b1f25"),
    "line": ("#e3e1dc", "#2c323a"),
    "grid": ("#ecebe7", "#272c33"),
    "accent": ("#0b62a8", "#6cb4ee"),
    "down": ("#c2500a", "#f0914e"),
    "same": ("#9aa1a9", "#6f7882"),
    "heat": ("#0b4f8a", "#7cc0f5"),
    "empty": ("#efeeea", "#262b32"),
    "c0": ("#0072b2", "#4aa8e0"),
    "c1": ("#d55e00", "#f2813a"),
    "c2": ("#009e73", "#2fc79a"),
    "c3": ("#c2589a", "#e08ac0"),
    "c4": ("#b98a00", "#e3b53a"),
    "c5": ("#3aa3dd", "#8fd0f5"),
    "c6": ("#7a5cc4", "#a68ee8"),
    "c7": ("#6b7280", "#9ca3af"),
}
"""Colours by CSS variable: (light, dark). The light ones differ from each other, since they stand for the variable."""

Tooltips = Mapping[str, tuple[Sequence[str], str]]
"""By the id of a group: a tooltip for each of its marks, or none, and the CSS class of the group."""

_VARIABLES = {light: f"var(--{name})" for name, (light, _) in PALETTE.items()}


def for_page(text: str, label: str, tooltips: Tooltips) -> Markup:
    """Return an SVG as an element of a page whose style sheet sets the palette; tooltips become `data-tip`.

    Args:
        text: what matplotlib wrote.
        label: the text for screen readers.
        tooltips: the marks' tooltips and classes.
    """
    root = _tidied(text, label, tooltips)
    width = float(root.get("viewBox", "0 0 0 0").split()[2])
    # On a phone a wide chart scrolls sideways inside its box, so that its text stays readable.
    root.set("style", f"width:{width * 1.15:.0f}px;min-width:{width * (0.7 if width <= 480 else 0.8):.0f}px")
    return Markup('<div class="plot">{}</div>').format(Markup(ElementTree.tostring(root, encoding="unicode")))


def for_file(text: str, label: str, tooltips: Tooltips) -> str:
    """Return an SVG as a file of its own, which follows the reader's light or dark mode; tooltips become `<title>`."""
    root = _tidied(text, label, tooltips)
    root.set("xmlns", "http://www.w3.org/2000/svg")
    for mark in [element for element in root.iter() if "data-tip" in element.attrib]:
        ElementTree.SubElement(mark, "title").text = mark.attrib.pop("data-tip")
    light, dark = ("".join(f"--{name}:{pair[mode]};" for name, pair in PALETTE.items()) for mode in (0, 1))
    style = Element("style")
    style.text = (
        f":root{{{light}}}@media(prefers-color-scheme:dark){{:root{{{dark}}}}}text{{font-family:system-ui,sans-serif}}"
    )
    root.insert(0, style)
    ElementTree.indent(root, space="")
    return ElementTree.tostring(root, encoding="unicode") + "\n"


def _tidied(text: str, label: str, tooltips: Tooltips) -> Element:
    root = ElementTree.fromstring(_clean(text))
    for element in root.iter():
        element.tag = element.tag.rpartition("}")[2]
    root[:] = [child for child in root if child.tag == "g"]
    groups = {element.get("id", ""): element for element in root.iter("g")}
    for name, (tips, css) in tooltips.items():
        groups[name].set("class", css)
        for mark, tip in zip(_marks(groups[name]), tips, strict=True) if tips else ():
            mark.set("data-tip", _clean(tip))
    for element in root.iter():
        _tidy(element)
    root.attrib = {"viewBox": root.get("viewBox", ""), "role": "img", "aria-label": _clean(label), "class": "drawing"}
    return root


def _clean(text: str) -> str:
    """Replace control characters and surrogates, which names in a run's files may hold and XML does not."""
    return re.sub("[\x00-\x08\x0b\x0c\x0e-\x1f\ud800-\udfff\ufffe\uffff]", "\ufffd", text)


def _marks(group: Element) -> list[Element]:
    """Return the drawn shapes of a group in order, without the definitions that they refer to."""
    defined = {id(shape) for block in group.iter("defs") for shape in block.iter()}
    return [shape for shape in group.iter() if shape.tag in {"path", "use"} and id(shape) not in defined]


def _tidy(element: Element) -> None:
    """Drop what a reader does not need, round positions, and replace the palette's colours by their variables."""
    for name in [name for name in element.attrib if "}" in name]:
        element.attrib[name.rpartition("}")[2]] = element.attrib.pop(name)
    if element.tag in {"g", "text"} and (name := element.attrib.pop("id", "")) in {"name", "line", "value"}:
        element.set("class", name)
    # Clip paths are not kept: nothing is drawn outside its panel, except what shall be.
    element.attrib.pop("clip-path", None)
    if element.get("transform", "").startswith("rotate(-0 "):
        del element.attrib["transform"]
    if style := element.get("style"):
        kept = [part.strip() for part in style.split(";") if not part.strip().startswith("font-family")]
        element.set("style", re.sub("#[0-9a-f]{6}", lambda found: _VARIABLES.get(found[0], found[0]), ";".join(kept)))
    for name in {"d", "x", "y"} & set(element.attrib):
        short = re.sub(r"-?\d+\.\d+", lambda found: f"{float(found[0]):.1f}".removesuffix(".0"), element.attrib[name])
        element.set(name, " ".join(short.split()))
    if element.tag != "text":
        element.text = None
    element.tail = None
