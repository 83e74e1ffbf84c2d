"""The queue of jobs behind docs/findings.md: finished jobs are skipped, interrupted jobs resume.

A job trains what its methods lack in its run folder under runs/findings/, answers all queries and writes its result to
docs/results/findings/JOB.json, or its cells to those of its table.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from dataclasses import replace
from pathlib import Path
from typing import Any

from experiments.jobs import RUNS, Job, fits, key_of, lacking, settings_of, state
from experiments.questions import shown_pairs
from experiments.score_tables import merged
from proper.console import terminal_logging
from proper.errors import ProperError
from proper.files import read_json, write_json


def listing(jobs: list[Job], by_name: Mapping[str, Job], *, keep: bool) -> str:
    """Return the state of each of `jobs` and the minutes that remain, as text."""
    states = {job.name: state(job, by_name, keep=keep) for job in jobs}
    lines = []
    for job in jobs:
        questions = ", ".join(map(str, job.questions))
        lines.append(f"{states[job.name]:<6} {job.name:<28} question {questions:<8} ~{job.minutes:g} min")
    remaining = [job for job in jobs if states[job.name] != "done"]
    minutes = sum(job.minutes for job in remaining)
    lines.append(f"{len(jobs) - len(remaining)} of {len(jobs)} done, about {minutes:g} minutes remain")
    return "\n".join(lines)


def run(jobs: list[Job], by_name: Mapping[str, Job], max_minutes: float | None, *, keep: bool) -> int:
    """Run those of `jobs` that are not done, in order; return the exit code."""
    started, exit_code = time.monotonic(), 0
    for job in jobs:
        if state(job, by_name, keep=keep) == "done":
            print(f"done     {job.name}", flush=True)
            continue
        spent = (time.monotonic() - started) / 60
        if max_minutes is not None and spent + job.minutes > max_minutes:
            remaining = max_minutes - spent
            print(f"skipped  {job.name}: about {job.minutes:g} minutes, {remaining:.0f} remain", flush=True)
            continue
        print(f"starting {job.name}: about {job.minutes:g} minutes, log in runs/findings/{job.name}.log", flush=True)
        try:
            run_job(job, keep=keep)
        except ProperError as error:
            print(f"failed   {job.name}: {error}", file=sys.stderr, flush=True)
            exit_code = 1
    print(listing(jobs, by_name, keep=keep).splitlines()[-1])
    return exit_code


def run_job(job: Job, *, keep: bool = False) -> None:
    """Run one job and write its result; its output goes to runs/findings/JOB.log.

    Of a table's job, run the cells that the table lacks, and write them seed by seed.
    """
    if job.table:
        there = read_json(job.result) if job.result.exists() else None
        for seed, methods in lacking(job, there, keep=keep).items():
            _add_cells(replace(job, seeds=(seed,), methods=tuple(methods)))
        return
    started = time.perf_counter()
    with _output_to(RUNS / f"{job.name}.log"):
        print(f"{job.name}: in {job.folder.name}")
        result = _train_and_evaluate(job)
    header = {
        "job": job.name,
        "key": key_of(job),
        "key_without_code": key_of(job, code=False),
        "settings": settings_of(job.settings()),
        "questions": list(job.questions),
        "config": job.config,
        "methods": list(job.methods),
        "seeds": list(job.seeds),
        "minutes": round((time.perf_counter() - started) / 60, 1),
    }
    write_json(job.result, {**header, **result})


def _add_cells(job: Job) -> None:
    """Run a table's job of one seed and add its cells to the table, which another job may have written meanwhile."""
    from experiments.results import table_of

    with _output_to(RUNS / f"{job.name}.log"):
        print(f"{job.name}: in {job.folder.name}")
        _train_and_evaluate(job)
        new = table_of(job)
    there = read_json(job.result) if job.result.exists() else None
    # Those of the page and not the job's own: the jobs of one table make all of its figures anew.
    pairs = shown_pairs(f"findings/{job.result.name}")
    write_json(job.result, {"config": job.config, **merged(there if there and fits(job, there) else None, new, pairs)})


def _train_and_evaluate(job: Job) -> dict[str, Any]:
    # Imported here, because listing the jobs and writing the page need no torch.
    from experiments.data import make_data
    from experiments.results import collect
    from proper import pipeline

    if job.made is not None:
        make_data(job.made, job.data, RUNS / "data")
    settings = job.settings()
    stages = [*job.stages, *(["evaluate"] if job.methods else [])]
    pipeline.run(settings, job.folder, stages=stages, skip_bad_rows=job.skip_bad_rows)
    return collect(job) if job.methods and not job.prepares and not job.table else {}


@contextmanager
def _output_to(log: Path) -> Iterator[None]:
    """Append what is written to stdout and stderr to a file."""
    log.parent.mkdir(parents=True, exist_ok=True)
    with (
        log.open("a", encoding="utf-8", buffering=1) as file,
        redirect_stdout(file),
        redirect_stderr(file),
        terminal_logging(),
    ):
        yield
