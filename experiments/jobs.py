"""Jobs of recipes/findings.yaml: run, config, methods and seeds of each, and the inputs of a finished job's result.

A result has the settings of its job, and a key: a hash of the rest, of data and code. A job is done if its result has
the same key and settings. A setting that the result lacks is newer than it, and the same while it has its default.
Jobs with a `table` share its file: each is done if the table has a cell for each of its methods and seeds.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import yaml

from proper.config import Config, load_config, make_config
from proper.errors import ConfigError
from proper.evaluation.fingerprint import code_version
from proper.files import hash_file, hash_value, read_json

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "docs" / "results" / "findings"
RUNS = ROOT / "runs" / "findings"
TRAINING = ("data", "layers", "models", "adapters", "training")
CODE = (*TRAINING, "inference", "methods", "evaluation")
STAGES = ("population", "groups", "users")


@lru_cache
def _file_hash(path: Path) -> str:
    return hash_file(path) if path.is_file() else ""


@dataclass(frozen=True)
class Job:
    """One job of the queue; recipes/findings.yaml documents the keys.

    Attributes:
        run: name of the job's run folder; `config` and `sources` are those of the run.
        prepares: names of the jobs that this job prepares; a job that prepares others leaves no result of its own.
        changes: KEY=VALUE settings of the run that differ from its config.
        skip_bad_rows: whether the run leaves out bad rows, as `--skip-bad-rows` does.
        table: name of the committed table that the job adds cells to; such a job has a run folder for each seed.
    """

    name: str
    run: str
    config: str
    sources: tuple[str, ...]
    made: str | None
    seeds: tuple[int, ...]
    minutes: float
    methods: tuple[str, ...] = ()
    stages: tuple[str, ...] = STAGES
    questions: tuple[int, ...] = ()
    prepares: tuple[str, ...] = ()
    tasks: tuple[tuple[str, str], ...] = ()
    against: tuple[str, ...] = ()
    slice: str = ""
    routing: bool = False
    changes: tuple[str, ...] = ()
    skip_bad_rows: bool = False
    table: str = ""

    @property
    def folder(self) -> Path:
        """The run folder, shared by all jobs on a run with the same settings, data and training code."""
        # Without defaults, so that a new setting keeps the folder's name; the run itself compares all settings.
        settings = self.settings().model_dump(exclude={"evaluation": True, "data": {"path"}}, exclude_defaults=True)
        key = hash_value([settings, *map(_file_hash, self.data), code_version(*TRAINING)])
        return RUNS / (f"{self.run}-{key[:8]}" + "".join(f"-seed{seed}" for seed in self.seeds if self.table))

    @property
    def data(self) -> list[Path]:
        """The data files of the run, or the files from which its data is made."""
        return [(ROOT / source).resolve() for source in self.sources]

    @property
    def result(self) -> Path:
        """Path of the result, or of the marker that a preparing job is done."""
        return RUNS / f"{self.name}.done.json" if self.prepares else RESULTS / f"{self.table or self.name}.json"

    def settings(self) -> Config:
        """Return the run's config with this job's seeds and methods."""
        methods = self.methods or tuple(stage for stage in STAGES if stage in self.stages)
        chosen = [f"evaluation.seeds={list(self.seeds)}", f"evaluation.methods={json.dumps(methods)}"]
        return load_config(ROOT / self.config, [*self.changes, *chosen])


def read_queue(path: Path = ROOT / "recipes" / "findings.yaml") -> list[Job]:
    """Return the jobs of a queue file; a preparing job gets the questions of the jobs that it prepares."""
    queue = yaml.safe_load(path.read_text(encoding="utf-8"))
    questions_of = {row["name"]: row.get("questions", []) for row in queue["jobs"]}
    jobs = []
    for row in queue["jobs"]:
        run = queue["runs"][row["run"]]
        prepares = row.get("for", [])
        questions = row.get("questions") or sorted({number for name in prepares for number in questions_of[name]})
        jobs.append(
            Job(
                name=row["name"],
                run=row["run"],
                config=run["config"],
                sources=tuple(run["sources"]),
                made=run.get("made"),
                seeds=tuple(row["seeds"]),
                minutes=row["minutes"],
                methods=tuple(row.get("methods", ())),
                stages=tuple(row.get("stages", STAGES)),
                questions=tuple(questions),
                prepares=tuple(prepares),
                tasks=tuple(row.get("tasks", {}).items()),
                against=tuple(row.get("against", ())),
                slice=row.get("slice", ""),
                routing=row.get("routing", False),
                changes=tuple(run.get("set", ())),
                skip_bad_rows=run.get("skip_bad_rows", False),
                table=row.get("table", ""),
            )
        )
    return jobs


def key_of(job: Job, *, code: bool = True) -> str:
    """Return a hash of what a job's result depends on beside the settings: its data and, with `code`, the code."""
    made_of: list[Any] = [job.methods, job.stages, job.seeds, job.tasks, job.against, job.slice, job.routing]
    made_of += map(_file_hash, job.data)
    return hash_value([*made_of, code_version(*CODE)] if code else made_of)


def data_key(job: Job) -> str:
    """Return a hash of the data files of a job's run."""
    return hash_value([job.made, *map(_file_hash, job.data)])


def cell_key() -> str:
    """Return a hash of the code on which a cell of a table depends."""
    return hash_value(code_version(*CODE))


def settings_of(config: Config) -> dict[str, Any]:
    """Return the settings that a result depends on, and that `key_of` does not know."""
    return config.model_dump(mode="json", exclude={"evaluation": {"methods", "seeds"}, "data": {"path"}})


def _same_settings(there: dict[str, Any] | None, now: Config) -> bool:
    """Compare the settings in a result; a result of an earlier form has none."""
    if there is None:
        return False
    try:
        then = make_config({**there, "data": {**there["data"], "path": now.data.path}})
    except ConfigError:  # it has a setting that no longer exists
        return False
    return settings_of(then) == settings_of(now)


def state(job: Job, jobs: Mapping[str, Job], *, keep: bool = False) -> str:
    """Return "done", "stale" (made from other settings, data or code) or "to do"; with `keep` the code is ignored."""
    if job.prepares and all(state(jobs[name], jobs, keep=keep) == "done" for name in job.prepares):
        return "done"
    if not job.result.exists():
        return "to do"
    result = read_json(job.result)
    if job.table:
        return "stale" if lacking(job, result, keep=keep) else "done"
    same = result["key"] == key_of(job) or (keep and result["key_without_code"] == key_of(job, code=False))
    same = same and _same_settings(result.get("settings"), job.settings())
    if same and job.prepares and not job.folder.exists():
        return "to do"
    return "done" if same else "stale"


def lacking(job: Job, table: Mapping[str, Any] | None, *, keep: bool = False) -> dict[int, list[str]]:
    """Return the methods of a table's job that its table has not, or of other code, by seed; with `keep` of any code.

    A table of other settings or data has none of them.
    """
    usable = table is not None and fits(job, table)
    cells = table["cells"] if table is not None and usable else {}

    def has(method: str, seed: int) -> bool:
        cell = cells.get(method, {}).get(str(seed))
        return cell is not None and (keep or cell["code"] == cell_key())

    found = {seed: [method for method in job.methods if not has(method, seed)] for seed in job.seeds}
    return {seed: methods for seed, methods in found.items() if methods}


def fits(job: Job, table: Mapping[str, Any]) -> bool:
    """Return whether a table is of the settings and data of a job."""
    return table.get("data") == data_key(job) and _same_settings(table.get("settings"), job.settings())
