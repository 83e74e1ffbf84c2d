"""Fingerprints for cache keys: of the package's own source, and of what a run's users are answered with.

Changed code, and users who were updated, rolled back or refreshed since, invalidate results.
"""

from __future__ import annotations

import ast
import hashlib
from collections.abc import Collection
from contextlib import closing
from functools import cache, lru_cache
from importlib.resources import files
from pathlib import Path

from proper.adapters.store import AdapterStore
from proper.data.dataset import Dataset
from proper.files import hash_file, hash_value
from proper.run_folder import RunFolder, Stage


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


def served_version(run: RunFolder, dataset: Dataset, stages: Collection[Stage]) -> str:
    """Return a hash of the groups and the target users' current records, as far as `stages` use them; else "".

    The marker of a stage does not change with its users: `users update`, `rollback` and `import` and `groups refresh`
    leave it as it is.
    """
    if not {Stage.GROUPS, Stage.USERS} & set(stages):
        return ""
    found: list[object] = [hash_file(run.experts)]
    with closing(AdapterStore(run.users.path)) as store:
        for user in dataset.users("target"):
            head = store.head(user.id)
            own = [] if head is None else [head.embedding.numpy().tobytes().hex()]
            if head is not None and Stage.USERS in stages:
                own += [str(head.tier), "" if head.checksum is None else head.checksum.hex()]
            found.append([user.id, *own])
    return hash_value(found)


def bare_syntax(source: str) -> str:
    """Return a module's syntax tree as text, without docstrings."""
    tree = ast.parse(source)
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            first = node.body[0] if node.body else None
            if isinstance(first, ast.Expr) and isinstance(first.value, ast.Constant):
                node.body = node.body[1:]
    return ast.dump(tree)
