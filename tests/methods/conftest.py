"""A trained run of seconds: a tiny random Llama, six users who label short texts, each in their own way."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from proper import pipeline
from proper.config import Config, make_config

HISTORIES = {"ann": 13, "bob": 9, "çem": 8, "dan/../x": 6, "eve": 10, "fay": 3}
WORDS = ["red", "green", "blue", "small", "large", "old", "new", "quiet", "loud", "round"]


def write_rows(path: Path) -> None:
    with path.open("w", encoding="utf-8") as file:
        for number, (user, size) in enumerate(HISTORIES.items()):
            for at in range(size):
                text = " ".join(WORDS[(number * 3 + at * k) % 10] for k in range(1, 3 + (at * 5 + number) % 7))
                label = WORDS[(number + (at % 4 == 0)) % 3]
                row = {"user_id": user, "timestamp": at, "input": f"{text} is", "output": label, "item_id": f"i{at}"}
                file.write(json.dumps(row) + "\n")


def answers(run: Path, method: str) -> list[dict[str, Any]]:
    """Return the predictions of a method."""
    lines = (run / "predictions" / f"{method}.jsonl").read_text(encoding="utf-8").splitlines()
    return [json.loads(line) for line in lines]


def steps_of(folder: Path, stage: str) -> list[tuple[int, int]]:
    """Return number and tokens of the logged steps of a stage."""
    rows = map(json.loads, (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines())
    return [(row["step"], row["tokens"]) for row in rows if row["stage"] == stage]


@pytest.fixture(scope="session")
def settings(tmp_path_factory: pytest.TempPathFactory, backbone_folder: Path) -> Callable[..., Config]:
    """Build the config of a run; sections are merged."""
    path = tmp_path_factory.mktemp("rows") / "rows.jsonl"
    write_rows(path)

    def build(**changes: Any) -> Config:
        raw: dict[str, Any] = {
            "data": {"path": str(path), "prompt": "{input}"},
            "task": {"kind": "classification"},
            "backbone": str(backbone_folder),
            "compute": {"dtype": "fp32", "max_length": 64, "device": "cpu"},
            "split": {"target_users": 4, "min_history": 3},
            "population": {"epochs": 1, "learning_rate": 1e-3},
            "groups": {"epochs": 1, "user_embedding": 16, "experts": 3, "learning_rate": 1e-3, "dropout": 0},
            "users": {"epochs": 2, "learning_rate": 1e-2, "slots": 2, "tiers": {"select": False}},
            "evaluation": {"methods": ["population", "groups", "users"], "resamples": 100, "seeds": [0]},
        }
        for key, value in changes.items():
            raw[key] = {**raw.get(key, {}), **value} if isinstance(value, dict) else value
        return make_config(raw)

    return build


@pytest.fixture(scope="session")
def run(settings: Callable[..., Config], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run folder with all three stages of its own."""
    folder = tmp_path_factory.mktemp("run") / "run"
    return pipeline.run(settings(), folder, stages=["population", "groups", "users"])
