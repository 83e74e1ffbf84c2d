"""The queue of jobs behind docs/findings.md: what is done is skipped, what was killed goes on.

    python scripts/findings.py run [--only 10] [--max-minutes 60] [--keep] [--list]
    python scripts/findings.py page

`recipes/findings.yaml` says which jobs there are. A job trains what its methods lack in its run folder under
runs/findings/, answers all queries and leaves docs/results/findings/JOB.json, with a key of its settings, data and
code: it is done where that file has the same key. Knows nothing about what the results mean; `findings_page` does.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import yaml

sys.path.insert(0, str(Path(__file__).parent))
import findings_page  # noqa: E402 - scripts are no package

from proper.config import Config, load_config  # noqa: E402
from proper.console import terminal_logging  # noqa: E402
from proper.errors import ProperError  # noqa: E402
from proper.evaluation.fingerprint import code_version  # noqa: E402
from proper.files import hash_file, hash_value, read_json, write_json, write_text  # noqa: E402

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
    """One line of the queue; see recipes/findings.yaml.

    Attributes:
        run: its run folder's name; `config` and `sources` are that run's.
        prepares: the jobs that it is a part of; one that prepares leaves no result.
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

    @property
    def folder(self) -> Path:
        """The run folder, one for all jobs on a run while its settings, data and training code are the same."""
        settings = self.settings().model_dump(exclude={"evaluation": True, "data": {"path"}})
        key = hash_value([settings, *map(_file_hash, self.data), code_version(*TRAINING)])
        return RUNS / f"{self.run}-{key[:8]}"

    @property
    def data(self) -> list[Path]:
        """The files that its data is read from or made of."""
        return [(ROOT / source).resolve() for source in self.sources]

    @property
    def result(self) -> Path:
        """Where the result lies, or that a preparing job is done."""
        return RUNS / f"{self.name}.done.json" if self.prepares else RESULTS / f"{self.name}.json"

    def settings(self) -> Config:
        """The run's config with this job's seeds and methods."""
        methods = self.methods or tuple(stage for stage in STAGES if stage in self.stages)
        changes = [f"evaluation.seeds={list(self.seeds)}", f"evaluation.methods={json.dumps(methods)}"]
        return load_config(ROOT / self.config, changes)


def read_queue(path: Path = ROOT / "recipes" / "findings.yaml") -> list[Job]:
    """Read the queue; a preparing job gets the questions of what it prepares."""
    queue = yaml.safe_load(path.read_text(encoding="utf-8"))
    asked = {row["name"]: row.get("questions", []) for row in queue["jobs"]}
    jobs = []
    for row in queue["jobs"]:
        run = queue["runs"][row["run"]]
        prepares = row.get("for", [])
        questions = row.get("questions") or sorted({number for name in prepares for number in asked[name]})
        jobs.append(
            Job(
                **{key: row[key] for key in ("name", "run", "minutes")},
                config=run["config"],
                sources=tuple(run["sources"]),
                made=run.get("made"),
                **{key: tuple(row[key]) for key in ("seeds", "methods", "stages", "against") if key in row},
                questions=tuple(questions),
                prepares=tuple(prepares),
                tasks=tuple(row.get("tasks", {}).items()),
                slice=row.get("slice", ""),
                routing=row.get("routing", False),
            )
        )
    return jobs


def key_of(job: Job, *, code: bool = True) -> str:
    """Return what a job's result hangs on, as a hash: settings, data and, unless told otherwise, code."""
    settings = job.settings().model_dump(exclude={"evaluation": {"methods", "seeds"}, "data": {"path"}})
    made_of: list[Any] = [settings, job.methods, job.stages, job.seeds, job.tasks, job.against, job.slice, job.routing]
    made_of += map(_file_hash, job.data)
    return hash_value([*made_of, code_version(*CODE)] if code else made_of)


def state(job: Job, jobs: Mapping[str, Job], *, keep: bool = False) -> str:
    """Return "done", "stale" (made by other settings, data or code) or "to do"; `keep` asks nothing of the code."""
    if job.prepares and all(state(jobs[name], jobs, keep=keep) == "done" for name in job.prepares):
        return "done"
    if not job.result.exists():
        return "to do"
    held = read_json(job.result)
    same = held["key"] == key_of(job) or (keep and held["key_without_code"] == key_of(job, code=False))
    if same and job.prepares and not job.folder.exists():
        return "to do"
    return "done" if same else "stale"


def listing(jobs: list[Job], by_name: Mapping[str, Job], *, keep: bool) -> str:
    """Return what of `jobs` is done and what remains, with minutes."""
    states = {job.name: state(job, by_name, keep=keep) for job in jobs}
    lines = []
    for job in jobs:
        asked = ", ".join(map(str, job.questions))
        lines.append(f"{states[job.name]:<6} {job.name:<28} question {asked:<8} ~{job.minutes:g} min")
    left = [job for job in jobs if states[job.name] != "done"]
    lines.append(
        f"{len(jobs) - len(left)} of {len(jobs)} done, about {sum(job.minutes for job in left):g} minutes remain"
    )
    return "\n".join(lines)


def work(job: Job) -> dict[str, Any]:
    """Train what the job lacks, answer, and return its result."""
    import findings_data  # listing and the page need no torch
    import findings_results

    from proper import pipeline

    if job.made is not None:
        findings_data.make_data(job.made, job.data, RUNS / "data")
    settings = job.settings()
    pipeline.run(settings, job.folder, stages=[*job.stages, *(["evaluate"] if job.methods else [])])
    return findings_results.collect(job) if job.methods and not job.prepares else {}


def do(job: Job) -> None:
    """Do one job and write its result; what it says goes to runs/findings/JOB.log."""
    started = time.perf_counter()
    with _said_to(RUNS / f"{job.name}.log"):
        print(f"{job.name}: in {job.folder.name}")
        found = work(job)
    facts = {
        "job": job.name,
        "key": key_of(job),
        "key_without_code": key_of(job, code=False),
        "questions": list(job.questions),
        "config": job.config,
        "methods": list(job.methods),
        "seeds": list(job.seeds),
        "minutes": round((time.perf_counter() - started) / 60, 1),
    }
    write_json(job.result, {**facts, **found})


@contextmanager
def _said_to(log: Path) -> Iterator[None]:
    """Send what is written to stdout and stderr to the end of a file."""
    log.parent.mkdir(parents=True, exist_ok=True)
    with (
        log.open("a", encoding="utf-8", buffering=1) as file,
        redirect_stdout(file),
        redirect_stderr(file),
        terminal_logging(),
    ):
        yield


def run(chosen: list[Job], by_name: Mapping[str, Job], max_minutes: float | None, *, keep: bool) -> int:
    """Do what remains of the chosen jobs, in their order; returns the exit code."""
    started, failed = time.monotonic(), 0
    for job in chosen:
        if state(job, by_name, keep=keep) == "done":
            print(f"done   {job.name}", flush=True)
            continue
        spent = (time.monotonic() - started) / 60
        if max_minutes is not None and spent + job.minutes > max_minutes:
            print(f"left   {job.name}: about {job.minutes:g} minutes, {max_minutes - spent:.0f} are left", flush=True)
            continue
        print(f"begins {job.name}: about {job.minutes:g} minutes, log in runs/findings/{job.name}.log", flush=True)
        try:
            do(job)
        except ProperError as error:
            print(f"failed {job.name}: {error}", file=sys.stderr, flush=True)
            failed = 1
    print(listing(chosen, by_name, keep=keep).splitlines()[-1])
    return failed


def main() -> int:
    """Read the command line and do what it says."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    runs = commands.add_parser("run", help="do the jobs that remain")
    runs.add_argument("--only", type=int, nargs="+", default=[], metavar="N", help="the jobs of these questions")
    runs.add_argument("--max-minutes", type=float, metavar="M", help="begin no job that would end later")
    runs.add_argument("--keep", action="store_true", help="a result of other code is done all the same")
    runs.add_argument("--list", action="store_true", help="say what is done and what remains, and do nothing")
    commands.add_parser("page", help="write docs/findings.md and its figures from the committed results")
    told = parser.parse_args()
    if told.command == "page":
        for path, text in findings_page.pages(ROOT / "docs" / "results").items():
            write_text(ROOT / "docs" / path, text)
        return 0
    by_name = {job.name: job for job in read_queue()}
    chosen = [job for job in by_name.values() if not told.only or set(told.only) & set(job.questions)]
    if told.list:
        print(listing(chosen, by_name, keep=told.keep))
        return 0
    return run(chosen, by_name, told.max_minutes, keep=told.keep)


if __name__ == "__main__":
    sys.exit(main())
