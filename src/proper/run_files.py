"""The registry of the files of a run folder: every file that may lie in one, and whether it can hold personal data.

`files.atomic_path` and `files.atomic_folder` ask `require_listed` before they write, so a file that is not listed here
cannot be written into a run folder. Deletion (`people.places`) has a remover for each pattern of `PERSONAL` and does
not start without one. What is written in other ways (SQLite files, blobs, logs, locks) has a fixed name that is listed.

A pattern is relative to a run folder, or to a folder of a seed or a variant below it (`seeds/N/`, `variants/NAME/`);
`**` at its end is any path. Knows nothing about what the files mean.
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
"""Users of the default tenant; each pattern has its remover in `people.places`."""

STORES = (
    "users/users.sqlite*",
    "users/users.lock",
    "users/blobs/*",
    "users/interactions.sqlite*",
    "users/fits.lock",
    "users/fits/**",
    "users/quarantine/**",
)
"""Users of every tenant: the store, the log, and what fits leave to go on from."""

UNFINISHED = ("population/stage.checkpoint", "groups/stage.checkpoint", "users/work")
"""What a stage leaves while it is trained: its users are in it, and cannot be taken out before the stage ends."""

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
    "groups/stage.json",
    "users/stage.json",
    "users/router.safetensors",
    "tombstones/*",
    "writers.lock",
)
"""What no single user can be read out of, or taken out of."""

TEMPORARY = ".*.tmp"
"""Folders of `files.atomic_path`; those whose writer is dead are removed by `files.sweep`."""

_NESTED = ("seeds", "variants")
_MARKS = ("users/users.sqlite", "population/stage.json")


def kind_of(relative: PurePath) -> Kind | None:
    """Return what the registry says of a path relative to a run folder; None for a path that is not listed."""
    while relative.parts[0] in _NESTED and len(relative.parts) > 2 and relative.parts[:2] != ("variants", "data"):
        relative = PurePath(*relative.parts[2:])
    if any(fnmatchcase(part, TEMPORARY) for part in relative.parts):
        return "unfinished"
    # A file that is personal is listed before the wider patterns of shared ones.
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
    """See that a file or folder that lies in a run folder is one of the registry.

    Raises:
        InputError: it is not; names the path and the run folder.
    """
    place = path.parent.resolve() / path.name
    runs = [parent for parent in place.parents if is_run(parent)]
    if runs and all(kind_of(place.relative_to(run)) is None for run in runs):
        raise InputError(
            f"{path}: lies in the run folder {runs[-1]}, where deleting a user would not find it; choose another place"
        )


def is_run(folder: Path) -> bool:
    """Whether a folder is a run folder that has come as far as its first stage."""
    return (folder / "config.yaml").is_file() and any((folder / mark).is_file() for mark in _MARKS)


def run_home(folder: Path) -> Path:
    """Return the run folder that a folder of a seed or a variant belongs to; data and tombstones lie there."""
    while folder.parent.name in _NESTED:
        folder = folder.parent.parent
    return folder


def _matches(parts: tuple[str, ...], pattern: str) -> bool:
    wanted = pattern.split("/")
    if wanted[-1] == "**":
        wanted = wanted[:-1]
        return len(parts) > len(wanted) and all(map(fnmatchcase, parts, wanted))
    return len(parts) == len(wanted) and all(map(fnmatchcase, parts, wanted))
