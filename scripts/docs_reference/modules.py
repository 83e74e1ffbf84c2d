"""List of all modules with the first line of each docstring, and the diagram of the packages."""

from __future__ import annotations

import ast
import html
import re
import tomllib
from collections.abc import Iterator
from itertools import groupby
from pathlib import Path

from docs_reference.markdown import NOTE, code, escape, table

ROOT = Path(__file__).parents[2]
PACKAGE = ROOT / "src" / "proper"
FILLS = ("#fdf3df", "#eef2fb", "#e9f6ec", "#f6ecf8", "#ffffff")


def page() -> str:
    """Return the page: a table per package, in the order of the import contract."""
    order = {name: at for at, line in enumerate(layers()) for name in line if (PACKAGE / name).is_dir()}
    found = sorted(modules(), key=lambda one: (order.get(_package(one[0]), -1), _package(one[0]), one[0]))
    parts = [NOTE, "# Modules\n", f"All {len(found)} modules of `proper` and what each provides.\n"]
    for package, members in groupby(found, key=lambda one: _package(one[0])):
        rows = [(code(name), escape(line)) for name, line in members]
        title = f"proper.{package}" if package else "proper"
        parts.append(f"## {code(title)}\n\n{table(('module', 'provides'), rows)}")
    return "\n".join(parts)


def modules() -> Iterator[tuple[str, str]]:
    """Yield every module's dotted name and the first line of its docstring."""
    for path in sorted(PACKAGE.rglob("*.py")):
        parts = path.relative_to(PACKAGE.parent).with_suffix("").parts
        text = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or ""
        if text:
            yield ".".join(parts).removesuffix(".__init__"), text.splitlines()[0]


def layers() -> list[list[str]]:
    """Return the lines of the import contract in `pyproject.toml`, from the top."""
    contracts = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["importlinter"][
        "contracts"
    ]
    lines = next(contract["layers"] for contract in contracts if contract["type"] == "layers")
    return [re.findall(r"\w+", line) for line in lines]


def diagram() -> str:
    """Return the packages as an SVG, one row per line of the import contract."""
    width, step, left = 860, 44, 40
    rows = layers()
    height = 14 + step * len(rows) + 24
    lines = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" height="{height}" '
        'font-family="system-ui, sans-serif" font-size="13">',
        "<title>Packages of proper; imports point down only</title>",
        f'<rect width="{width}" height="{height}" fill="#fff"/>',
        f'<path d="M20 14V{14 + step * len(rows) - 12}m-5-8 5 8 5-8" fill="none" stroke="#555" stroke-width="1.4"/>',
    ]
    for at, names in enumerate(rows):
        box = (width - left - 14 - 10 * (len(names) - 1)) / len(names)
        for column, name in enumerate(names):
            x, y = left + column * (box + 10), 14 + at * step
            fill = FILLS[min(at * len(FILLS) // len(rows), len(FILLS) - 1)]
            lines.append(
                f'<rect x="{x:.0f}" y="{y}" width="{box:.0f}" height="34" rx="6" fill="{fill}" stroke="#556"/>'
            )
            lines.append(f'<text x="{x + box / 2:.0f}" y="{y + 22}" text-anchor="middle">{html.escape(name)}</text>')
    note = "Imports point down only; packages on one line do not import each other."
    lines.append(f'<text x="{left}" y="{height - 10}" font-size="12" fill="#444">{note}</text>')
    return "\n".join([*lines, "</svg>"]) + "\n"


def _package(name: str) -> str:
    """Return the package below `proper` that a module is in; nothing for a module beside the packages."""
    first = name.split(".")[1] if "." in name else ""
    return first if first and (PACKAGE / first).is_dir() else ""
