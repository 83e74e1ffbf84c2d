"""One noun for one thing: a class name occurs once in the package."""

from __future__ import annotations

import ast
from collections import defaultdict
from pathlib import Path

import proper

ROOT = Path(proper.__file__).parent


def test_a_class_name_occurs_once() -> None:
    places = defaultdict(list)
    for path in sorted(ROOT.rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ClassDef):
                places[node.name].append(path.relative_to(ROOT).as_posix())
    assert {name: found for name, found in places.items() if len(found) > 1} == {}
