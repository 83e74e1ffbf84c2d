"""No import circle in the package, and no class that overrides a method of a concrete class of it."""

from __future__ import annotations

import ast
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

import proper

ROOT = Path(proper.__file__).parent
# Benchmarks that time a changed part of the package inside the rest of it.
EXEMPT = {"LoopedExperts", "RecordingTrainer"}


def module_of(path: Path) -> str:
    parts = path.relative_to(ROOT.parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


TREES = {module_of(path): ast.parse(path.read_text(encoding="utf-8")) for path in sorted(ROOT.rglob("*.py"))}


def imports_of(tree: ast.Module) -> set[str]:
    """Modules of the package that a module imports anywhere, under `TYPE_CHECKING` and inside functions too."""
    found: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module is not None:
            inner = {f"{node.module}.{alias.name}" for alias in node.names}
            found |= inner & TREES.keys() or {node.module}
    return found & TREES.keys()


def methods_of(node: ast.ClassDef) -> set[str]:
    found = {inner.name for inner in node.body if isinstance(inner, ast.FunctionDef | ast.AsyncFunctionDef)}
    return {name for name in found if not name.startswith("__")}


def test_no_import_circle() -> None:
    graph = {name: imports_of(tree) - {name} for name, tree in TREES.items()}
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        pytest.fail(f"these modules import each other: {' -> '.join(error.args[1])}")


def test_no_class_overrides_a_concrete_method() -> None:
    classes = {node.name: node for tree in TREES.values() for node in ast.walk(tree) if isinstance(node, ast.ClassDef)}
    overrides = []
    for name, node in classes.items():
        if name in EXEMPT:
            continue
        for base in (base.id for base in node.bases if isinstance(base, ast.Name) and base.id in classes):
            is_protocol = any(isinstance(one, ast.Name) and one.id == "Protocol" for one in classes[base].bases)
            if not is_protocol:
                overrides += [f"{name}.{method}" for method in methods_of(node) & methods_of(classes[base])]
    assert overrides == []
