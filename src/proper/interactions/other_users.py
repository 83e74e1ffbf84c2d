"""Content of a run that does not indicate a deleted user: other users' ids and texts, labels and templates."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

import yaml
from safetensors import safe_open

from proper.adapters.manifest import key_of
from proper.adapters.store import DEFAULT_TENANT
from proper.databases.location import is_made
from proper.interactions.log import InteractionLog
from proper.interactions.user_rows import users_of_data, users_of_stores
from proper.run_folder import RunFolder, nested_runs
from proper.sqlite_files import open_to_read

_ROWS = 1000  # rows of a table in memory at once


def other_ids(run: RunFolder, names: set[str]) -> Iterator[str]:
    """Yield the ids of all other users of the run's data, store and log, those of other tenants included."""
    found = {user for _, user in users_of_stores(run.users.path)}
    if run.data.is_file():
        found |= users_of_data(run.data)
    yield from found - names


def texts_of_others(run: RunFolder, names: set[str]) -> Iterator[bytes]:
    """Yield content that does not indicate a deleted user: other users' texts, labels, templates, mean embedding."""
    for folder in nested_runs(run.path):
        path = RunFolder(folder).experts
        if path.is_file():
            with safe_open(path, "pt") as tensors:  # a user who learnt nothing has the mean
                if "mean_embedding" in tensors.keys():  # noqa: SIM118
                    yield tensors.get_tensor("mean_embedding").float().numpy().tobytes()
    if run.config.is_file():
        config = yaml.safe_load(run.config.read_text(encoding="utf-8")) or {}
        for one in (config, *(config.get("tasks") or {}).values()):
            data, task = one.get("data") or {}, one.get("task") or {}
            yield repr([data.get("prompt"), data.get("target"), task.get("labels")]).encode()
    marks = ", ".join("?" * len(names))
    if run.data.is_file():
        query = f"""SELECT t.prompt, t.target, coalesce(t.item, '') FROM rows r JOIN texts t ON t.id = r.text
            JOIN users u ON u.number = r.user WHERE u.id NOT IN ({marks})"""
        yield from _cells(run.data, query, sorted(names))
        yield from _cells(run.data, "SELECT value FROM meta WHERE key = 'labels'", ())
    if is_made(run.users.log):
        keys = {key_of(name) for name in names}
        with closing(InteractionLog(run.users.path)) as log:
            for tenant, key, *texts in log.texts():
                if tenant != DEFAULT_TENANT or key not in keys:
                    yield "\0".join(("", *map(str, texts), "")).encode("utf-8", "surrogatepass")


def _cells(path: Path, query: str, values: Sequence[Any]) -> Iterator[bytes]:
    with closing(open_to_read(path)) as data:
        rows = data.execute(query, values)
        while some := rows.fetchmany(_ROWS):
            yield "\0".join(str(cell) for row in some for cell in ("", *row, "")).encode("utf-8", "surrogatepass")
