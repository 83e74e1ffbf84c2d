"""The glossary of CONTRIBUTING.md has every shape letter that an annotation uses."""

from __future__ import annotations

import re
from pathlib import Path

import proper

SOURCE = Path(proper.__file__).parent
CONTRIBUTING = Path(__file__).parents[1] / "CONTRIBUTING.md"
SHAPE = re.compile(r"(?:Float|Int|Int8|Bool|BFloat16|Shaped|UInt8)\[(?:Tensor|np\.ndarray), \"([^\"]*)\"\]")


def test_every_shape_letter_is_explained() -> None:
    rows = re.findall(r"^\| ([A-Za-z](?:, [A-Za-z])*) \|", CONTRIBUTING.read_text(encoding="utf-8"), re.MULTILINE)
    explained = {letter for row in rows for letter in row.split(", ")}
    shapes = [shape for path in SOURCE.rglob("*.py") for shape in SHAPE.findall(path.read_text(encoding="utf-8"))]
    used = {letter for shape in shapes for letter in re.findall(r"(?<![A-Za-z])[A-Za-z](?![a-z])", shape)}
    assert {"B", "T", "I", "O", "R", "V"} <= used, "the search reads annotations"
    assert used - {"ER"} <= explained, f"not in the glossary: {sorted(used - explained)}"
