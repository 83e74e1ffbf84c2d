"""A folder in which jobs of the findings run in seconds."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import pytest

from experiments import jobs, queue

MakeJob = Callable[..., jobs.Job]


@pytest.fixture
def make_job(backbone_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> MakeJob:
    """`make_job(rows, config, ...)`: a job on these rows; its run is below `runs`, its results are in `results`."""
    monkeypatch.chdir(tmp_path)
    for module in (jobs, queue):
        monkeypatch.setattr(module, "RUNS", tmp_path / "runs")
    monkeypatch.setattr(jobs, "RESULTS", tmp_path / "results")

    def make(rows: Iterable[Mapping[str, Any]], config: Mapping[str, Any], **job: Any) -> jobs.Job:
        path = tmp_path / "rows.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        whole = {
            "data": {"path": path.name},  # from where it is run, as in configs/
            "backbone": str(backbone_folder),
            "compute": {"dtype": "fp32", "max_length": 64, "device": "cpu"},
            "split": {"min_history": 3, "queries": 0.3},
            "population": {"epochs": 1},
            **config,
        }
        (tmp_path / "config.yaml").write_text(json.dumps(whole), encoding="utf-8")
        own = {"config": str(tmp_path / "config.yaml"), "sources": (str(path),), "made": None, "minutes": 1}
        return jobs.Job(run="tiny", **own, **job)

    return make
