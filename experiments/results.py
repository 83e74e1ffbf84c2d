"""Committed result of a job, from its run folder: all metrics, tests, cost and routing.

Knows where a run's files lie; nothing about the queue.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

from experiments.jobs import Job, cell_key, data_key, settings_of
from experiments.score_tables import Table, cell_of
from proper.config import Config, load_config
from proper.data.dataset import Dataset
from proper.evaluation.comparisons import Scores, comparison_rows
from proper.evaluation.metrics import Prediction, TaskInfo, primary_metric
from proper.evaluation.power import expected_power
from proper.evaluation.results import RawResults, build_results, plain, require_same_queries
from proper.evaluation.routing import analyze_routing
from proper.evaluation.runner import mean_gates, read_predictions
from proper.evaluation.scoring import Predictions, score_all
from proper.evaluation.slices import history_slices
from proper.evaluation.statistics import Effort
from proper.evaluation.style import user_habits
from proper.files import hash_value, read_json
from proper.inference.loading import load
from proper.methods.derived_runs import trained_run
from proper.methods.spec import Method, TrainedRun
from proper.methods.table import known_methods, table_methods
from proper.run_folder import RunFolder
from proper.training.seeds import seed_folder

KEPT = ("run", "task", "personalization", "metrics", "comparisons", "cost")


def collect(job: Job) -> dict[str, Any]:
    """Return what is committed of a job that has just been evaluated."""
    # As the run wrote it, paths made absolute: variants are found by it, and trained once more by any other.
    config = load_config(job.folder / "config.yaml")
    results = read_json(job.folder / "results.json")
    predictions = _predictions(job.folder, config, job.methods)
    task = results["task"]
    labels = _labels(task["kind"], predictions)
    info = TaskInfo(task["name"], task["kind"], labels)
    with closing(Dataset.open(job.folder / "data.sqlite")) as dataset:
        power = expected_power(dataset, config.task.kind)
        found: dict[str, Any] = {"expected_to_show": None if power is None else power.smallest, **small(results)}
        found["comparisons"] += _against(job, score_all(predictions, info), info, found["comparisons"])
        if job.slice:
            found["slice"] = of_slice(job, predictions, info, results)
        if job.routing:
            found["routing_of"] = {
                method.name: routing_of(method, job.folder, config, dataset)
                for method in known_methods(job.methods, config)
                if method.stages[-1:] == ("groups",)
            }
        if job.tasks:
            found["tasks"] = {
                asked: small(of_task(job, predictions, asked, kind, results["run"])) for asked, kind in job.tasks
            }
    return dict(plain(found))


def table_of(job: Job) -> Table:
    """Return the cells of a table's job of one seed that has just been evaluated, the rows of every table included."""
    config = load_config(job.folder / "config.yaml")
    results = read_json(job.folder / "results.json")
    methods = [method.name for method in table_methods(job.methods, config)]
    predictions = _predictions(job.folder, config, methods)
    task = TaskInfo(results["task"]["name"], results["task"]["kind"], _labels(results["task"]["kind"], predictions))
    with closing(Dataset.open(job.folder / "data.sqlite")) as dataset:
        habits = user_habits(dataset, config.task.kind)
        # Those of the run: a method that retrieves has other prompts.
        queries = sorted((row.id, row.user, row.prompt, row.target) for row in dataset.queries())
    (seed,) = predictions
    scores = score_all(predictions, task, habits)
    measured = {"code": cell_key(), "device": results["run"]["device"]}
    cells = {
        method: {str(seed): cell_of({name: one for (of, name), one in scores.items() if of == method}, **measured)}
        for method in methods
    }
    return {
        **{"settings": settings_of(job.settings()), "data": data_key(job), "run": results["run"]},
        **{"task": results["task"], "cost": results["cost"], "cells": cells},
        "counts": next(iter(scores.values())).counts.tolist(),
        "queries": hash_value(queries),
    }


def small(results: Mapping[str, Any]) -> dict[str, Any]:
    """Return the parts of results that the page reads, with every metric."""
    return {name: results[name] for name in KEPT if name in results}


def routing_of(method: Method, home: Path, config: Config, dataset: Dataset) -> dict[str, Any]:
    """Return the routing figures of a method that ends with groups, of the first seed."""
    opened: dict[Path, Dataset] = {}
    run = TrainedRun(config, dataset, home, config.evaluation.seeds[0])
    trained = trained_run(method, run, home, opened)
    users = list(dataset.users("target"))
    ids = [user.id for user in users]
    model = load(trained.folder, "groups")
    try:
        assert model.served is not None
        embeddings = model.served.embeddings(ids)
        gates = mean_gates(model, trained.dataset, ids)
    finally:
        model.close()
        for each in opened.values():
            each.close()
    return analyze_routing(gates.numpy(), ids, embeddings.numpy(), {user.id: user.history for user in users})[0]


def of_slice(job: Job, predictions: Predictions, task: TaskInfo, results: Mapping[str, Any]) -> dict[str, Any]:
    """Return the main metric, the loss, and the job's comparisons by both on the users of one slice alone."""
    histories = require_same_queries(predictions)
    users = set(history_slices(histories)[job.slice])
    scores = {key: one.only(users) for key, one in score_all(predictions, task).items()}
    rows = [row for row in results["slices"] if row["slice"] == job.slice]
    kept = [row for metric in (primary_metric(task), "loss") for row in rows if row["metric"] == metric]
    return {"name": job.slice, "metrics": kept, "comparisons": _against(job, scores, task, ())}


def of_task(job: Job, predictions: Predictions, asked: str, kind: str, run: Mapping[str, Any]) -> dict[str, Any]:
    """Return the results on the queries that ask for `asked` in the last line of their prompt."""
    part = {
        seed: {method: [row for row in rows if _asks(row, asked)] for method, rows in by_method.items()}
        for seed, by_method in predictions.items()
    }
    task = TaskInfo(asked.lower(), kind, _labels(kind, part))  # type: ignore[arg-type]
    results = build_results(RawResults(predictions=part, task=task, run=run, seconds={}))
    return {
        **results,
        "comparisons": [*results["comparisons"], *_against(job, score_all(part, task), task, results["comparisons"])],
    }


def _against(job: Job, scores: Scores, task: TaskInfo, there: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Compare every method with each of the job's `against`, by the main metric and the loss, where not yet done."""
    pairs = [(method, other) for other in job.against for method in job.methods if method != other]
    rows = []
    for metric in (primary_metric(task), "loss"):
        done = {(row["method"], row["against"]) for row in there if row["metric"] == metric}
        done |= {(against, method) for method, against in done}
        wanted = {key: one for key, one in scores.items() if key[1] == metric}
        rows += comparison_rows(wanted, [p for p in pairs if p not in done], task, Effort())
    return rows


def _predictions(home: Path, config: Config, methods: Sequence[str]) -> Predictions:
    # What is not trained was answered once, in the run folder itself.
    trained = {method.name: bool(method.stages) for method in known_methods(methods, config)}
    found = {}
    for seed in config.evaluation.seeds:
        places = {name: seed_folder(home, config, seed) if own else home for name, own in trained.items()}
        found[seed] = {name: read_predictions(RunFolder(at).predictions_of(name)) for name, at in places.items()}
    return found


def _labels(kind: str, predictions: Predictions) -> tuple[str, ...]:
    """Return the labels that occur as true answers: the scale's ends, for a rating."""
    rows = next(iter(next(iter(predictions.values())).values()))
    return () if kind == "generation" else tuple(sorted({row.target for row in rows}))


def _asks(row: Prediction, asked: str) -> bool:
    return row.prompt.rstrip().rsplit("\n", 1)[-1].rstrip(": ") == asked
