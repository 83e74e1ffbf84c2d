"""Stages 1 and 2 in two processes are the same training as in one, and only the first process writes."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from proper.adapters.store import AdapterStore
from proper.config import Config
from proper.data.dataset import prepare
from proper.data.encoder import Encoder
from proper.files import read_json, write_text
from proper.models.backbone import load_tokenizer
from proper.models.checkpoints import load_tensors
from proper.training.metrics_log import MetricsLog
from proper.training.stages import StageRunner

STAGES = ("population", "groups", "users")
SCRIPT = Path(__file__).with_name("several_processes.py")


@dataclass(frozen=True)
class Outcome:
    """What one process made of a config (`alone`), two of the same (`exact`), and two of one with dropout (`usual`)."""

    alone: Path
    exact: Path
    usual: Path
    notes: Path

    def memory(self, rank: int) -> dict[str, torch.Tensor]:
        return load_tensors(self.notes / f"memory-{rank}.safetensors")[0]


def _curve(folder: Path, stage: str) -> list[dict[str, Any]]:
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [line for line in lines if line["stage"] == stage]


def _claimed(folder: Path, config: Config) -> Path:
    write_text(folder / "config.yaml", yaml.safe_dump(config.model_dump()))
    return folder


@pytest.fixture(scope="module")
def outcome(llama: Path, job: Any, tmp_path_factory: pytest.TempPathFactory) -> Outcome:
    home = tmp_path_factory.mktemp("processes")
    training = {"max_tokens": None, "learning_rate": 3e-3, "epochs": 3, "batch_size": 9, "gradient_accumulation": 2}
    exact = job.config(llama, population=training, groups=training | {"constraint": {"kind": "none"}})
    usual = job.config(llama, population={"dropout": 0.1}, groups={"dropout": 0.1})
    encoder = Encoder(load_tokenizer("proper-nano"), exact.compute.max_length)
    alone = _claimed(home / "alone", exact)
    with prepare(exact, home / "data.sqlite", encoder.count) as dataset:
        assert dataset.sample("all", None, 0).size % 9 == 1, "a pass should end on one row, which one process lacks"
        log = MetricsLog(alone / "metrics.jsonl")
        StageRunner(exact, dataset, alone, 0, log).run(STAGES)
        log.close()
    found = Outcome(alone, _claimed(home / "exact", exact), _claimed(home / "usual", usual), home / "notes")
    found.notes.mkdir()
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", str(SCRIPT)]
    paths = [home / "data.sqlite", found.notes, found.exact, found.usual]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"}
    done = subprocess.run([*command, *map(str, paths)], env=environment, capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stderr[-3000:]
    return found


@pytest.mark.parametrize("stage", ["population", "groups"])
def test_the_loss_curve_is_that_of_one_process(outcome: Outcome, stage: str) -> None:
    one, two = _curve(outcome.alone, stage), _curve(outcome.exact, stage)
    assert [line["step"] for line in one] == [line["step"] for line in two] == list(range(1, len(one) + 1))
    assert len(one) == 6
    for left, right in zip(one, two, strict=True):
        assert right["loss"] == pytest.approx(left["loss"], abs=1e-4)
        assert right["gradient_norm"] == pytest.approx(left["gradient_norm"], rel=1e-3)
        assert right["learning_rate"] == left["learning_rate"]
    assert one[-1]["loss"] < one[0]["loss"] - 0.05


def test_what_is_trained_is_that_of_one_process(outcome: Outcome) -> None:
    for file in ("population/adapter_model.safetensors", "groups/groups.safetensors"):
        one, two = (load_tensors(folder / file)[0] for folder in (outcome.alone, outcome.exact))
        assert one.keys() == two.keys()
        for name, tensor in one.items():
            torch.testing.assert_close(two[name], tensor, rtol=0, atol=1e-4, msg=lambda t, n=name: f"{n}: {t}")
    stores = [AdapterStore(folder / "users") for folder in (outcome.alone, outcome.exact)]
    users = [list(store.users()) for store in stores]
    assert users[0] == users[1]
    embeddings = [torch.stack([store.get(user).embedding for user, _ in users[0]]) for store in stores]
    torch.testing.assert_close(embeddings[1], embeddings[0], rtol=0, atol=1e-5)
    assert embeddings[0].std() > 0.025, "they start at 0.02"
    for store in stores:
        store.close()


@pytest.mark.parametrize("name", ["exact", "usual"])
def test_all_processes_hold_the_same_weights(outcome: Outcome, name: str) -> None:
    """Bit for bit, dropout and constraint included: nothing is ever sent around to repair a drift."""
    first, second = (outcome.memory(rank) for rank in (0, 1))
    held = [key for key in first if key.startswith(f"{name}/") and ".lora_router." not in key]
    assert any(".experts." in key for key in held) and any(".router." in key for key in held)
    for key in held:
        assert torch.equal(first[key], second[key]), key


def test_only_the_first_process_writes(outcome: Outcome) -> None:
    written, other = (read_json(outcome.notes / f"writes-{rank}.json") for rank in (0, 1))
    assert other == []
    files = [path for folder in (outcome.exact, outcome.usual) for path in folder.rglob("*.json*")]
    assert any("stage.json" in line for line in written) and any("sqlite3.connect" in line for line in written)
    assert {file.parent.name for file in files if file.name == "stage.json"} == set(STAGES)
