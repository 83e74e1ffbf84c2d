"""Measures one run over two tasks against one run per task, and against experts that tasks do not share.

    python -m experiments.tasks huffpost|git FOLDER [--users 30] [--items 24] [--tokens 20000] [--out FILE.json]

The data is the newest `--items` rows of the `--users` users with the most rows. Both tasks read these rows, so a user
has the same queries, the newest fifth, in all runs:

    joint      both tasks in one run: one population stage, shared experts with a task term, one adapter per user
    separate   the same population; twice the experts, of which each task has its own half; one adapter per user
    alone      a run of its own for each task

`--tokens` is the budget of stages 1 and 2 for one task; the joint run has it twice, and its users have twice the steps
and items. Every user gets an adapter, after a fixed number of steps. A difference is `joint` minus the other on the
same queries, paired by user, with an interval of 95 % by resampling users.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections import Counter
from collections.abc import Sequence
from contextlib import closing
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq

from proper.config import Config, make_config
from proper.data.dataset import Dataset
from proper.data.one_task import one_task
from proper.evaluation.metrics import Prediction, TaskInfo
from proper.evaluation.results import plain
from proper.evaluation.routing import task_routing
from proper.evaluation.runner import mean_gates, read_predictions
from proper.evaluation.statistics import compare, estimate, user_scores
from proper.files import read_json, write_json, write_text
from proper.inference.loading import load
from proper.methods.evaluate import evaluating
from proper.methods.table import known_methods
from proper.pipeline import run
from proper.run_config import run_config
from proper.run_folder import RunFolder, Stage
from proper.run_lock import exclusive

LABEL, TEXT = {"kind": "classification"}, {"kind": "generation", "max_new_tokens": 16}
SETS: dict[str, tuple[str, dict[str, tuple[str, str, dict[str, Any]]]]] = {
    "huffpost": (
        "data/huffpost-news/huffpost_news.parquet",
        {
            "label": ("Headline: {headline}\nDescription: {description}\nCategory:", "{label}", LABEL),
            "headline": ("Write the headline.\n\n{description}\n\nHeadline:", "{headline}", TEXT),
        },
    ),
    "git": (
        "data/git-commits/git_commits.parquet",
        {
            "area": ("Subject: {subject}\nDescription: {body}\nFolder:", "{area}", LABEL),
            "subject": ("Write the subject line of this commit.\n\n{body}\n\nSubject:", "{subject}", TEXT),
        },
    ),
}
EXPERTS = 5
ITEMS = 4
APART = f"[groups.task_experts=separate][groups.experts={2 * EXPERTS}]"


def newest_rows(source: Path, path: Path, users: int, items: int) -> None:
    """Write the newest rows of the users with the most, with times that order them, and without empty texts."""
    rows = pq.read_table(source).to_pylist()
    rows = [row for row in rows if all(str(value).strip() for key, value in row.items() if key != "prefix")]
    counts = Counter(row["user_id"] for row in rows)
    wanted = {user for user, _ in sorted(counts.items(), key=lambda pair: (-pair[1], pair[0]))[:users]}
    rows = sorted((row for row in rows if row["user_id"] in wanted), key=lambda row: (row["timestamp"], row["item_id"]))
    kept: dict[str, list[dict[str, Any]]] = {}
    for at, row in enumerate(rows):
        kept.setdefault(row["user_id"], []).append({**row, "timestamp": at})
    lines = [json.dumps(row, ensure_ascii=False) for own in kept.values() for row in own[-items:]]
    write_text(path, "\n".join(lines) + "\n")


def configs(rows: Path, name: str, users: int, items: int, tokens: int) -> dict[str, Config]:
    """Return the configs of the joint run and of each task alone."""
    tasks = {
        task: {"data": {"path": str(rows.resolve()), "prompt": prompt, "target": target}, "task": kind}
        for task, (prompt, target, kind) in SETS[name][1].items()
    }

    unused = {"user_encoder": False}

    def config(share: int, **own: Any) -> Config:
        return make_config(
            {
                **own,
                "split": {"target_users": users, "min_history": 2, "shared_items": "allow"},
                "compute": {"max_length": 48, "device": "cpu"},
                "population": {"epochs": 1, "max_tokens": share * tokens, "patience": 0},
                "groups": {"epochs": 1, "max_tokens": share * tokens, "experts": EXPERTS, "layers": 3} | unused,
                "users": {"steps": share * 8, "max_items": share * items // 2, "tiers": {"select": False}},
                "evaluation": {"methods": ["population", "groups", "users"], "seeds": [0]},
            }
        )

    return {"joint": config(2, tasks=tasks), **{task: config(1, **one) for task, one in tasks.items()}}


def answer(folder: Path, methods: Sequence[str]) -> None:
    """Train what methods need beyond the run, and write their predictions, unless these are there."""
    config = run_config(folder)
    with (
        exclusive(folder),
        Dataset.open(RunFolder(folder).data) as dataset,
        evaluating(config, dataset, {0: folder}) as evaluator,
    ):
        for method in evaluator.specs(known_methods(methods, config)):
            method.answers(0)


def measure(folder: Path, name: str) -> dict[str, Any]:
    """Return the metrics and differences of the runs that are finished, the joint one among them, by task."""
    joint = RunFolder(folder / "joint")
    found: list[dict[str, Any]] = []
    for task, (_, _, kind) in SETS[name][1].items():
        with Dataset.open(joint.data) as dataset, one_task(dataset, task) as own:
            info = TaskInfo(task, kind["kind"], tuple(own.labels))
        alone = RunFolder(folder / task)
        for method in ("population", "groups", "users"):
            ours = _answers(joint, method, task)
            sides = {"joint": ours}
            if alone.predictions_of(method).exists():
                sides["alone"] = _answers(alone, method, "")
            if joint.predictions_of(f"{method}{APART}").exists():
                sides["separate"] = _answers(joint, f"{method}{APART}", task)
            for metric in ("accuracy" if kind == LABEL else "rouge1", "loss"):
                scores = {side: user_scores(metric, [rows], info) for side, rows in sides.items()}
                row: dict[str, Any] = {"task": task, "method": method, "metric": metric}
                row |= {"users": len({each.user for each in ours}), "queries": len(ours)}
                row |= {side: estimate(each).value for side, each in scores.items()}
                for side in [side for side in scores if side != "joint"]:
                    row[f"joint_minus_{side}"] = asdict(compare(scores["joint"], scores[side]))
                found.append(row)
    return {"rows": found, "routing": _routing(folder / "joint"), "seconds": _seconds(folder)}


def _answers(run_folder: RunFolder, method: str, task: str) -> list[Prediction]:
    """Return a task's predictions, numbered by what is asked, since rows have other numbers in another run."""
    rows = [row for row in read_predictions(run_folder.predictions_of(method)) if row.task == task]
    rows.sort(key=lambda row: (row.user, row.prompt, row.target))
    return [replace(row, id=at) for at, row in enumerate(rows)]


def _routing(folder: Path) -> dict[str, Any]:
    """Return which experts serve which task, on the newest `ITEMS` items of each user."""
    found = {}
    with closing(load(folder, "groups")) as model, Dataset.open(RunFolder(folder).data) as dataset:
        for task in dataset.tasks:
            with one_task(dataset, task) as own:
                found[task] = mean_gates(model, own, [user.id for user in own.users("target")], ITEMS).numpy()
    return task_routing(found)


def _seconds(folder: Path) -> dict[str, float]:
    """Return the training seconds of each trained run, all stages."""
    return {
        path.name: sum(float(read_json(RunFolder(path).marker(stage))["seconds"]) for stage in Stage)
        for path in sorted(folder.iterdir())
        if path.is_dir() and RunFolder(path).is_trained(Stage.USERS)
    }


def main(arguments: Sequence[str]) -> int:
    """Run what is not finished, and write the figures."""
    parser = argparse.ArgumentParser(prog="python -m experiments.tasks", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("name", choices=sorted(SETS))
    parser.add_argument("folder", type=Path)
    parser.add_argument("--users", type=int, default=30)
    parser.add_argument("--items", type=int, default=24)
    parser.add_argument("--tokens", type=int, default=20_000)
    parser.add_argument("--only", help="what to finish: joint, separate or a task; the figures are of what is there")
    parser.add_argument("--out", type=Path)
    asked = parser.parse_args(arguments)
    rows = asked.folder.parent / f"{asked.folder.name}.jsonl"
    if not rows.exists():
        newest_rows(Path(SETS[asked.name][0]), rows, asked.users, asked.items)
    made = configs(rows, asked.name, asked.users, asked.items, asked.tokens)
    for name, config in made.items():
        if asked.only in (None, name):
            run(config, asked.folder / name, stages=list(Stage))
            answer(asked.folder / name, config.evaluation.methods)
    if asked.only in (None, "separate"):
        answer(asked.folder / "joint", [f"groups{APART}", f"users{APART}"])
    if RunFolder(asked.folder / "joint").predictions_of("users").exists():
        setting = {"data": asked.name, "users": asked.users, "items": asked.items, "tokens": asked.tokens, "seed": 0}
        setting["backbone"] = made["joint"].backbone
        figures = plain({"setting": setting, "figures": measure(asked.folder, asked.name)})
        if asked.out is not None:
            write_json(asked.out, figures)
        else:
            print(json.dumps(figures, indent=1))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
