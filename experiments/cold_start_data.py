"""Runs with stages 1 and 2, and the items of users whom no stage has read: data of `cold_start` and `starts`."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pyarrow.parquet as pq

from proper.config import Config, make_config
from proper.data.dataset import Dataset
from proper.data.demo import DemoSettings, demo_run, write_demo
from proper.data.derived.retrieval import retrieve, with_items
from proper.data.encoder import EncodedExample
from proper.data.histories import TextExample
from proper.enrolment.fit_user import Fitter
from proper.files import write_text
from proper.interactions.parsing import read_users
from proper.methods.per_user_lora import direct_model
from proper.methods.retrieved import token_counter
from proper.models.personal import ProperModel
from proper.pipeline import run
from proper.run_folder import RunFolder
from proper.training.metrics_log import no_log
from proper.training.stages import StageRunner

RAG_ITEMS = 4
"""Most earlier items in front of a prompt."""


def make_demo(folder: Path, people: int = 160, left: int = 40, seed: int = 0) -> None:
    """Train stages 1 and 2 on the demo's users without the last `left`, and write the items of these."""
    settings = DemoSettings(users=people, seed=seed)
    write_demo(folder, settings)
    rows = [json.loads(line) for line in (folder / "interactions.jsonl").read_text(encoding="utf-8").splitlines()]
    new = set(list(dict.fromkeys(row["user_id"] for row in rows))[-left:])
    for name, wanted in (("train.jsonl", False), ("new.jsonl", True)):
        kept = (row for row in rows if (row["user_id"] in new) == wanted)
        write_text(folder / name, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in kept))
    raw = demo_run((folder / "train.jsonl").resolve(), settings)
    raw["split"]["target_users"] = people - left
    raw["groups"] = {**raw["groups"], "epochs": 3}
    run(make_config(raw), folder / "run", stages=("population", "groups"))


def make_huffpost(folder: Path, source: Path) -> None:
    """Train stages 1 and 2 on HuffPost authors, and write the articles of others, of whom no stage reads anything.

    Of the 70 authors with the most articles, every fourth from the sixth is new, as are authors after these with at
    least 28 articles. The prompt is the headline alone.
    """
    columns = ["user_id", "item_id", "timestamp", "headline", "label"]
    rows = [row for row in pq.read_table(source, columns=columns).to_pylist() if row["headline"].strip()]
    counts = Counter(row["user_id"] for row in rows)
    authors = sorted(counts, key=lambda user: (-counts[user], user))
    new = {user for at, user in enumerate(authors) if at in range(5, 69, 4) or at >= 70 and counts[user] >= 28}
    old = set(authors[:70]) - new
    for name, wanted in (("train.jsonl", old), ("new.jsonl", new)):
        kept = sorted((row for row in rows if row["user_id"] in wanted), key=lambda row: row["timestamp"])
        write_text(folder / name, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in kept))
    config = {
        "data": {"path": str(folder.resolve() / "train.jsonl"), "prompt": "Headline: {headline}\nCategory:"}
        | {"target": "{label}"},
        "task": {"kind": "classification"},
        "split": {"target_users": 30, "min_history": 15, "max_queries": 200},
        "population": {"epochs": 1, "max_tokens": 50_000},
        "groups": {"epochs": 2, "max_tokens": 40_000, "layers": 4, "batch_size": 16}
        | {"user_embedding": 32, "embedding_learning_rate": 0.1},
        "users": {"max_items": 20, "storage": "fp32"},
    }
    run(make_config(config), folder / "run", stages=("population", "groups"))


def histories_of(fitter: Fitter, path: Path, least: int) -> list[tuple[str, list[EncodedExample]]]:
    """Return the encoded items of the file's users with so many items or more."""
    return [(user, [fitter.model.encoder.encode(item) for item in own]) for user, own in texts_of(fitter, path, least)]


def texts_of(fitter: Fitter, path: Path, least: int) -> list[tuple[str, list[TextExample]]]:
    """Return the items of the file's users with so many items or more."""
    entries = read_users(path, fitter.model.config.data, fitter.model.config.task)
    tokens = fitter.model.encoder.count
    return [
        (
            user,
            [
                TextExample(0, user, each.prompt, each.target, None, None, tokens([each.prompt], [each.target])[0])
                for each in own
            ],
        )
        for user, own in entries.items()
        if len(own) >= least
    ]


def rag_population(config: Config, run_folder: Path, folder: Path) -> ProperModel:
    """Return stage 1 of `rag`: trained, if it is not yet, on the run's rows with their best earlier items in front."""
    count = token_counter(config)
    with Dataset.open(RunFolder(run_folder).data) as source:
        path = RunFolder(folder).data
        if not path.exists():
            retrieve(source, path, RAG_ITEMS, count, config.compute.max_length)
    with Dataset.open(path) as dataset:
        StageRunner(config, dataset, folder, 0, no_log).run(["population"])
    return direct_model(config, folder)


def with_earlier(
    fitter: Fitter, tests: Sequence[Sequence[TextExample]], known: Sequence[Sequence[TextExample]]
) -> list[list[EncodedExample]]:
    """Return the items asked with the best of each user's known items in front, encoded."""
    count, longest = token_counter(fitter.model.config), fitter.model.config.compute.max_length
    found = []
    for asked, items in zip(tests, known, strict=True):
        prompts = [with_items(row, items, RAG_ITEMS, count, longest).prompt for row in asked]
        rows = [replace(row, prompt=prompt) for row, prompt in zip(asked, prompts, strict=True)]
        found.append([fitter.model.encoder.encode(row) for row in rows])
    return found
