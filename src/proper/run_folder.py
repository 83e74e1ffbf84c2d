"""Layout of a run folder: every path and stage marker in it, and which of its files can hold personal data.

    RUN/                        config, data, results, report; see `RunFolder`
      population/  groups/      trained stages, each with a marker `stage.json` that is written last
      users/                    adapter store and interaction log of all tenants; see `UsersFolder`
      seeds/N/                  the same layout for each further seed
      variants/NAME-HASH/       the same layout for each method that needs its own training

No other module spells these names. `files.atomic_path` and `files.atomic_folder` call `require_listed` before they
write, so a file that is not listed here cannot be written into a run folder. Deletion (`interactions.personal_files`)
has a remover for each `Personal` pattern and does not start without one. Files that are written in other ways (SQLite
files, blobs, logs, locks) have fixed names, which are listed.

A pattern is relative to a run folder, or to the folder of a seed or a variant; `**` at its end matches any path.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from enum import StrEnum
from fnmatch import fnmatchcase
from pathlib import Path, PurePath
from typing import Literal

from proper.errors import InputError, RunFolderError

Kind = Literal["personal", "store", "unfinished", "shared"]
TEMPORARY = ".*.tmp"
"""Temporary folders of `files.atomic_path`; `files.sweep` removes those whose writer is dead."""
PEFT_WEIGHTS, PEFT_CONFIG = "adapter_model.safetensors", "adapter_config.json"
"""File names of a PEFT adapter folder, which `population/` is."""
MARKER = "stage.json"
"""File name of the marker that a trained stage has in its folder."""
_NESTED = ("seeds", "variants")
_MANY_FILES = ("blobs", "cache")
"""Folders of a store, which have a file for each large adapter and no folders."""


class Stage(StrEnum):
    """A training stage, in the order of training; the value names its folder and its config section."""

    POPULATION = "population"
    GROUPS = "groups"
    USERS = "users"


class Tier(StrEnum):
    """Which parts of the model answer a user, from the least to the most personal.

    BASE is the backbone alone, POPULATION adds the population LoRA. On top of both, NONE is the group model with the
    mean user embedding (an unknown user), GROUPS has the user's own embedding, and USERS the user's adapter as well.
    """

    BASE = "base"
    POPULATION = "population"
    NONE = "none"
    GROUPS = "groups"
    USERS = "users"


STAGE_METHODS: tuple[str, ...] = (Tier.BASE, Tier.POPULATION, Tier.GROUPS, Tier.USERS)
"""The backbone and the three stages, as compared methods."""

STEPS: tuple[tuple[str, str], ...] = ((Tier.GROUPS, Tier.POPULATION), (Tier.USERS, Tier.GROUPS))
"""Each personalized stage with the stage before it: their differences measure what the stage adds."""


class Personal(StrEnum):
    """Files with data of users of the default tenant; each pattern has its remover in `interactions.personal_files`."""

    LAMP_ANSWERS = "predictions/*.lamp.json"
    PREDICTIONS = "predictions/*.jsonl"
    USER_SCORES = "users.json"
    ROUTING = "routing.json"
    ANALYSIS = "analysis.json"
    REPORT = "report.html"
    USER_REPORTS = "report-user-*.html"
    COMPARISON_PAGES = "compare-*.html"
    COMPARISON_TABLES = "compare-*.csv"
    DATA = "data.sqlite"
    VARIANT_DATA = "variants/data/*.sqlite"
    VARIANT_DATA_UNFINISHED = "variants/data/*.sqlite.between"
    DEMO_ROWS = "data/*.jsonl"
    DEMO_TRUTH = "data/*.json"


STORES = (
    "users/users.sqlite*",
    *("users/users.lock", "users/fits.lock"),
    "users/blobs/*",
    "users/cache/*",
    "users/interactions.sqlite*",
    "users/fits/**",
    "users/quarantine/**",
)
"""Data of users of all tenants: the adapter store, the interaction log, and checkpoints of fits."""

UNFINISHED = (*(f"{at}.checkpoint" for at in ("population/stage", "groups/stage", "groups/experts")), "users/work")
"""Checkpoints of a stage in training: they contain its users' data, which cannot be removed before the stage ends."""

SHARED = (
    "config.yaml",
    "results.json",
    "methods.csv",
    "metrics.jsonl",
    "storage.json",
    "predictions/*.json",
    *("serving/keys.json", "serving/keys.lock", "serving/keys.required"),
    *("run.lock", "writers.lock"),
    "preflight.json",
    "population/*",
    *("groups/*.safetensors", "groups/stage.json", "groups/experts.json"),
    "users/stage.json",
    *("users/router.safetensors", "users/bases.safetensors", "users/start.safetensors"),
    "tombstones/*",
    *("database.json", "moving.json"),
)
"""Files from which no single user's data can be read or removed."""


class _Path:
    """A fixed path below a folder: `folder.config` is `folder.path / "config.yaml"`."""

    def __init__(self, *parts: str) -> None:
        self._below = Path(*parts)

    def __get__(self, folder: RunFolder | UsersFolder, owner: type) -> Path:
        return folder.path / self._below


@dataclass(frozen=True)
class UsersFolder:
    """Paths of an adapter store's folder, which in a run folder is `users/`; nothing has to exist yet."""

    path: Path
    manifest = _Path("users.sqlite")
    lock = _Path("users.lock")  # held to write blobs
    blobs = _Path("blobs")
    cache = _Path("cache")  # adapters of object storage
    log = _Path("interactions.sqlite")  # the interaction log, the fit queue and the deletions
    fits = _Path("fits")  # state for resuming fits of users after a kill
    fits_lock = _Path("fits.lock")  # held by the fitting process
    quarantine = _Path("quarantine")  # what a repair removed; any deletion of a user removes all of it
    router = _Path("router.safetensors")  # the LoRA-aware routers of stage 3
    bases = _Path("bases.safetensors")  # the A and B that all users share in the form `core`
    start = _Path("start.safetensors")  # the adapter that all users' adapters start from with `start: meta`
    work, refresh = _Path("work"), _Path("work", "refresh.safetensors")  # to resume stage 3, or a refresh of the groups


@dataclass(frozen=True)
class RunFolder:
    """Paths of a run folder, or of the folder of a seed or a variant below it; nothing has to exist yet."""

    path: Path
    config = _Path("config.yaml")
    storage = _Path("storage.json")  # which shard storage the run uses; not there: its own folder
    data = _Path("data.sqlite")
    metrics_log = _Path("metrics.jsonl")
    results, methods_table = _Path("results.json"), _Path("methods.csv")
    user_scores = _Path("users.json")
    routing = _Path("routing.json")
    analysis = _Path("analysis.json")
    report = _Path("report.html")
    predictions = _Path("predictions")
    preflight = _Path("preflight.json")
    tombstones = _Path("tombstones")
    database = _Path("database.json")  # where the state is, if not in SQLite files of this folder
    moving = _Path("moving.json")  # during a move of the state: the old place and the new one
    keys, keys_lock = _Path("serving", "keys.json"), _Path("serving", "keys.lock")  # API keys, as hashes
    keys_required = _Path("serving", "keys.required")  # exists if a server needs keys, even if the key file is lost
    lock = _Path("run.lock")  # held by the one process that trains, evaluates or reports
    writers_lock = _Path("writers.lock")  # held shared by all that write personal data, exclusively by a deletion
    demo_data, demo_rows, demo_truth = _Path("data"), _Path("data", "interactions.jsonl"), _Path("data", "truth.json")
    population = _Path("population")
    experts = _Path("groups", "groups.safetensors")  # experts, routers and the mean user embedding of stage 2
    found_experts, finding_experts = _Path("groups", "experts.json"), _Path("groups", "experts.checkpoint")  # of `auto`
    poly = _Path("groups", "poly.safetensors")  # the same for the method `poly`
    refreshed, previous = _Path("groups", "refreshed.safetensors"), _Path("groups", "previous.safetensors")
    encoder = _Path("groups", "encoder.safetensors")  # from a new user's items to an embedding

    @property
    def users(self) -> UsersFolder:
        """The adapter store's folder."""
        return UsersFolder(self.path / Stage.USERS)

    @property
    def home(self) -> RunFolder:
        """The run folder that this folder of a seed or a variant belongs to; it has the data and the tombstones."""
        home = path = self.path
        while path.parent.name in _NESTED:
            if is_run(path := path.parent.parent) and _has_users(RunFolder(path)):  # not for `--out seeds/a`
                home = path
        return RunFolder(home)

    def marker(self, stage: str) -> Path:
        """The marker of a stage, with its time and seed; it exists once the stage is trained."""
        return self.path / stage / MARKER

    def checkpoint(self, stage: str) -> Path:
        """State for resuming a stage after a kill."""
        return self.path / stage / "stage.checkpoint"

    def is_trained(self, stage: str) -> bool:
        """Return whether a stage is trained."""
        return self.marker(stage).exists()

    def require_trained(self, stage: str) -> None:
        """Raise RunFolderError unless a stage is trained; the message names the command that trains it."""
        if not self.is_trained(stage):
            hint = f"run: proper run CONFIG --out {self.home.path}"
            raise RunFolderError(f"{self.path}: stage '{stage}' is not trained yet; {hint}")

    def predictions_of(self, method: str) -> Path:
        """A method's answers to the queries, one JSON object a line."""
        return self.predictions / f"{method_file(method)}.jsonl"

    def seed(self, seed: int) -> RunFolder:
        """The folder of a further seed."""
        return RunFolder(self.path / "seeds" / str(seed))

    def variant(self, name: str) -> RunFolder:
        """The folder of a method that needs its own training."""
        return RunFolder(self.path / "variants" / name)

    def variant_data(self, name: str) -> Path:
        """The data of a method that is trained on other data than the run."""
        return self.path / "variants" / "data" / f"{name}.sqlite"

    def user_report(self, name: str) -> Path:
        """The page of one user; `name` is safe for a file name."""
        return self.path / f"report-user-{name}.html"

    def comparison(self, name: str, ending: str) -> Path:
        """The page (html) or table (csv) of the comparison with another run."""
        return self.path / f"compare-{name}.{ending}"


def method_file(method: str) -> str:
    """Return a method's name as a file's: `users[rows=yes/no]` has a slash."""
    return method.replace("%", "%25").replace("/", "%2F")


def is_run(folder: Path) -> bool:
    """Return whether a folder is a run folder: it has the config that `proper run` writes first."""
    return RunFolder(folder).config.is_file()


def require_run(folder: Path) -> RunFolder:
    """Return the paths of a run folder.

    Raises:
        RunFolderError: the folder is not a run folder.
    """
    run, hint = RunFolder(folder), f"run: proper run CONFIG --out {folder}"
    if not folder.is_dir():
        raise RunFolderError(f"{folder}: no such run folder")
    if not is_run(folder):
        raise RunFolderError(f"{folder}: not a run folder ({run.config.name} is missing); {hint}")
    return run


def nested_runs(run: Path) -> Iterator[Path]:
    """Yield the run folder and the run folders nested in it: further seeds and other methods."""
    yield run
    found, config = list[Path](), RunFolder(run).config.name
    for parent, folders, files in os.walk(run):
        if config in files:
            found.append(Path(parent, config))
        # A store may have a file for each of very many users.
        folders[:] = [name for name in folders if name not in _MANY_FILES]
    yield from (each.parent for each in sorted(found) if each.parent != run)


def kind_of(relative: PurePath) -> Kind | None:
    """Return the registry's kind of a path relative to a run folder; None for a path that is not listed."""
    while relative.parts[0] in _NESTED and len(relative.parts) > 2 and relative.parts[:2] != ("variants", "data"):
        relative = PurePath(*relative.parts[2:])
    if any(fnmatchcase(part, TEMPORARY) for part in relative.parts):
        return "unfinished"
    # Personal patterns come before the wider patterns of shared files; the first match counts.
    listed: tuple[tuple[Kind, tuple[str, ...]], ...] = (
        ("personal", tuple(Personal)),
        ("store", STORES),
        ("unfinished", (*UNFINISHED, "users/work/**", "data.sqlite-journal")),
        ("shared", SHARED),
    )
    for kind, patterns in listed:
        if any(_matches(relative.parts, pattern) for pattern in patterns):
            return kind
    return None


def require_listed(path: Path) -> None:
    """Check that a path, if it lies in a run folder with trained stages or a store, is in the registry.

    Raises:
        InputError: it is not; the message names the path and the run folder.
    """
    absolute = path.parent.resolve() / path.name
    runs = [parent for parent in absolute.parents if is_run(parent) and _has_users(RunFolder(parent))]
    if runs and all(kind_of(absolute.relative_to(run)) is None for run in runs):
        raise InputError(
            f"{path}: lies in the run folder {runs[-1]}, where deleting a user would not find it; choose another path"
        )


def _has_users(run: RunFolder) -> bool:
    """Whether a run may already hold personal data; another program's folder may have a `config.yaml`, too."""
    return run.users.manifest.is_file() or run.database.is_file() or run.is_trained(Stage.POPULATION)


def _matches(parts: tuple[str, ...], pattern: str) -> bool:
    wanted, deep = pattern.removesuffix("/**").split("/"), pattern.endswith("/**")
    fits = len(parts) > len(wanted) if deep else len(parts) == len(wanted)
    return fits and all(map(fnmatchcase, parts, wanted))
