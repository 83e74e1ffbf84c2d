"""Reads and changes made-up files of LaMP and OPPU for the tests of their formats."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from proper.config import Config, make_config
from proper.data.interactions import BadRows, Interaction, read_interactions


def config(folder: Path, task: str, form: str = "lamp", **sections: Any) -> Config:
    data = {"path": str(folder), "format": form, "task": task, **sections.pop("data", {})}
    sections["split"] = {"min_history": 1, **sections.get("split", {})}
    return make_config({"data": data, **sections})


def rows(settings: Config) -> list[Interaction]:
    bad = BadRows()
    found = list(read_interactions(settings.data, bad, settings.task))
    assert bad == BadRows()
    return found


def bad_rows(settings: Config) -> BadRows:
    bad = BadRows()
    list(read_interactions(settings.data, bad, settings.task))
    return bad


def edit(path: Path, change: Callable[[Any], Any]) -> None:
    value = json.loads(path.read_text(encoding="utf-8"))
    result = change(value)
    path.write_text(json.dumps(value if result is None else result), encoding="utf-8")
