"""Code fingerprint: a hash of the package's own source, part of cache keys so that changed code invalidates results."""

from __future__ import annotations

import ast
import hashlib
from functools import cache, lru_cache
from importlib.resources import files
from pathlib import Path


@lru_cache
def code_version(*paths: str) -> str:
    """Return a hash of the package's folders or files in `paths` ("training", "evaluation/runner.py").

    Comments, docstrings and formatting do not count: the hash is over syntax trees without docstrings.

    Raises:
        FileNotFoundError: the package has no such folder or file.
    """
    root = Path(str(files("proper")))
    state = hashlib.sha256()
    for name in paths:
        path = root / name
        if not path.exists():
            raise FileNotFoundError(path)
        for source in [path] if path.is_file() else sorted(path.rglob("*.py")):
            state.update(source.relative_to(root).as_posix().encode())
            state.update(_file_version(source))
    return state.hexdigest()[:12]


@cache
def _file_version(path: Path) -> bytes:
    """Hash a file once, although several keys are made of it."""
    return hashlib.sha256(bare_syntax(path.read_text(encoding="utf-8")).encode()).digest()


def bare_syntax(source: str) -> str:
    """Return a module's syntax tree as text, without docstrings."""
    tree = ast.parse(source)
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            first = node.body[0] if node.body else None
            if isinstance(first, ast.Expr) and isinstance(first.value, ast.Constant):
                node.body = node.body[1:]
    return ast.dump(tree)
