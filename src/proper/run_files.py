"""Registry of the files of a run folder: every path that may exist in one, and whether it can hold personal data.

`files.atomic_path` and `files.atomic_folder` call `require_listed` before they write, so a file that is not listed here
cannot be written into a run folder. Deletion (`interactions.personal_files`) has a remover for each pattern of
`PERSONAL` and does not start without one. Files that are written in other ways (SQLite files, blobs, logs, locks) have
fixed names, which are listed.

A pattern is relative to a run folder, or to a folder of a seed or a variant below it (`seeds/N/`, `variants/NAME/`);
`**` at its end matches any path.
"""

from __future__ import annotations

from fnmatch import fnmatchcase
from pathlib import Path, PurePath
from typing import Literal

from proper.errors import InputError

Kind = Literal["personal", "store", "unfinished", "shared"]

PERSONAL = (
    "predictions/*.lamp.json",
    "predictions/*.jsonl",
    "users.json",
    "routing.json",
    "analysis.json",
    "report.html",
    "report-user-*.html",
    "compare-*.html",
    "compare-*.csv",
    "data.sqlite",
    "variants/data/*.sqlite",
    "variants/data/*.sqlite.between",
    "data/*.jsonl",
    "data/*.json",
)
"""Data of users of the default tenant; each pattern has its remover in `interactions.personal_files`."""

STORES = (
    "users/users.sqlite*",
    "users/users.lock",
    "users/blobs/*",
    "users/interactions.sqlite*",
    "users/fits.lock",
    "users/fits/**",
    "users/quarantine/**",
)
"""Data of users of all tenants: the adapter store, the interaction log, and checkpoints of fits."""

UNFINISHED = ("population/stage.checkpoint", "groups/stage.checkpoint", "users/work")
"""Checkpoints of a stage in training: they contain its users' data, which cannot be removed before the stage ends."""

SHARED = (
    "config.yaml",
    "results.json",
    "methods.csv",
    "metrics.jsonl",
    "predictions/*.json",
    "serving/keys.json",
    "serving/keys.lock",
    "serving/keys.required",
    "run.lock",
    "preflight.json",
    "population/*",
    "groups/groups.safetensors",
    "groups/poly.safetensors",
    "groups/stage.json",
    "users/stage.json",
    "users/router.safetensors",
    "tombstones/*",
    "writers.lock",
)
"""Files from which no single user's data can be read or removed."""

TEMPORARY = ".*.tmp"
"""Temporary folders of `files.atomic_path`; `files.sweep` removes those whose writer is dead."""

_NESTED = ("seeds", "variants")
_MARKS = ("users/users.sqlite", "population/stage.json")


def kind_of(relative: PurePath) -> Kind | None:
    """Return the registry's kind of a path relative to a run folder; None for a path that is not listed."""
    while relative.parts[0] in _NESTED and len(relative.parts) > 2 and relative.parts[:2] != ("variants", "data"):
        relative = PurePath(*relative.parts[2:])
    if any(fnmatchcase(part, TEMPORARY) for part in relative.parts):
        return "unfinished"
    # Personal patterns come before the wider patterns of shared files; the first match counts.
    listed: tuple[tuple[Kind, tuple[str, ...]], ...] = (
        ("personal", PERSONAL),
        ("store", STORES),
        ("unfinished", (*UNFINISHED, "users/work/**", "data.sqlite-journal")),
        ("shared", SHARED),
    )
    for kind, patterns in listed:
        if any(_matches(relative.parts, pattern) for pattern in patterns):
            return kind
    return None


def require_listed(path: Path) -> None:
    """Check that a path, if it lies in a run folder, is in the registry.

    Raises:
        InputError: it is not; the message names the path and the run folder.
    """
    place = path.parent.resolve() / path.name
    runs = [parent for parent in place.parents if is_run(parent)]
    if runs and all(kind_of(place.relative_to(run)) is None for run in runs):
        raise InputError(
            f"{path}: lies in the run folder {runs[-1]}, where deleting a user would not find it; choose another place"
        )


def is_run(folder: Path) -> bool:
    """Return whether a folder is a run folder with at least one trained stage."""
    return (folder / "config.yaml").is_file() and any((folder / mark).is_file() for mark in _MARKS)


def run_home(folder: Path) -> Path:
    """Return the run folder that the folder of a seed or a variant belongs to; it has the data and the tombstones."""
    while folder.parent.name in _NESTED:
        folder = folder.parent.parent
    return folder


def _matches(parts: tuple[str, ...], pattern: str) -> bool:
    wanted = pattern.split("/")
    if wanted[-1] == "**":
        wanted = wanted[:-1]
        return len(parts) > len(wanted) and all(map(fnmatchcase, parts, wanted))
    return len(parts) == len(wanted) and all(map(fnmatchcase, parts, wanted))
