"""No import circle in the package, and no class that overrides a method of a concrete class of it."""

from __future__ import annotations

import ast
from collections.abc import Iterator, Mapping, Set
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

import proper

ROOT = Path(proper.__file__).parent
# Benchmarks that time a changed part of the package inside the rest of it.
EXEMPT = {"LoopedExperts", "RecordingTrainer"}


def module_name(path: Path, root: Path) -> str:
    """Return the dotted name of a module file below the package folder `root`."""
    parts = path.relative_to(root.parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imported(tree: ast.AST, package: str, known: Set[str]) -> Iterator[str]:
    """Yield the known modules that a module of `package` imports anywhere in its text.

    `from a import b` imports the module `a.b` if there is one, else `a`. Importing `a.b` also runs the packages above
    it; those count only if something is taken from them by name, because an empty package cannot close a circle.
    """
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if alias.name in known)
        elif isinstance(node, ast.ImportFrom):
            above = package.split(".")[: len(package.split(".")) - node.level + 1] if node.level else []
            source = ".".join([*above, *([node.module] if node.module else [])])
            for alias in node.names:
                inner = f"{source}.{alias.name}"
                if inner in known:
                    yield inner
                elif source in known:
                    yield source


def import_graph(root: Path) -> dict[str, set[str]]:
    """Return, for each module below the package folder `root`, the modules of the package that it imports."""
    paths = {module_name(path, root): path for path in sorted(root.rglob("*.py"))}
    graph = {}
    for name, path in paths.items():
        package = name if path.name == "__init__.py" else name.rpartition(".")[0]
        tree = ast.parse(path.read_text(encoding="utf-8"))
        graph[name] = set(imported(tree, package, paths.keys())) - {name}
    return graph


def circle(graph: Mapping[str, Set[str]]) -> list[str]:
    """Return a circle of imports, its first module repeated at its end; empty if there is none."""
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        found: list[str] = error.args[1]
        return found[::-1]
    return []


def test_the_package_has_no_circle_of_imports() -> None:
    graph = import_graph(ROOT)
    assert len(graph) > 100 and "proper.run_folder" in graph["proper.files"]
    found = circle(graph)
    assert not found, " imports ".join(found)


@pytest.mark.parametrize(
    ("first", "second", "expected"),
    [
        ("import pkg.b", "import pkg.a", True),
        ("from pkg import b", "def f():\n    from pkg.a import x", True),
        ("from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from pkg.b import y", "from . import a", True),
        ("from .b import y", "import os", False),
    ],
)
def test_a_circle_is_found(tmp_path: Path, first: str, second: str, expected: bool) -> None:
    root = tmp_path / "pkg"
    root.mkdir()
    for name, text in {"__init__": "", "a": first, "b": second}.items():
        (root / f"{name}.py").write_text(text)
    assert bool(circle(import_graph(root))) == expected


def methods_of(node: ast.ClassDef) -> set[str]:
    found = {inner.name for inner in node.body if isinstance(inner, ast.FunctionDef | ast.AsyncFunctionDef)}
    return {name for name in found if not name.startswith("__")}


def test_no_class_overrides_a_concrete_method() -> None:
    trees = [ast.parse(path.read_text(encoding="utf-8")) for path in ROOT.rglob("*.py")]
    classes = {node.name: node for tree in trees for node in ast.walk(tree) if isinstance(node, ast.ClassDef)}
    overrides = []
    for name, node in classes.items():
        if name in EXEMPT:
            continue
        for base in (base.id for base in node.bases if isinstance(base, ast.Name) and base.id in classes):
            is_protocol = any(isinstance(one, ast.Name) and one.id == "Protocol" for one in classes[base].bases)
            if not is_protocol:
                overrides += [f"{name}.{method}" for method in methods_of(node) & methods_of(classes[base])]
    assert overrides == []
