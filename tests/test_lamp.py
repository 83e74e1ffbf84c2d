"""LaMP from the benchmark's site to predictions that its scorer accepts, all seven tasks, on a tiny random backbone."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

from proper.cli.app import main
from proper.config import load_config
from proper.config.lamp_tasks import LAMP_TASKS
from proper.models.backbone import EMBEDDED, backbone_location
from tests import lamp_files

TASKS = [name for name in LAMP_TASKS if name != "lamp-6"]
TRAINED = ("lamp-2m", "lamp-3", "lamp-4")
"""One task of each kind goes through all stages; for the others the backbone answers."""
METHODS = ("base", "population", "groups", "users")
SHORT = {"epochs": 1, "max_tokens": 600, "batch_size": 8}


@pytest.fixture(scope="module")
def backbone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random Llama of one small layer with the tokenizer of `proper-nano`."""
    folder = tmp_path_factory.mktemp("backbone")
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}
    sizes |= {"vocab_size": 8192, "max_position_embeddings": 256}
    LlamaForCausalLM(LlamaConfig(tie_word_embeddings=True, **sizes)).save_pretrained(folder)
    AutoTokenizer.from_pretrained(backbone_location(EMBEDDED)).save_pretrained(folder)
    return folder


def publish(site: Any, task: str, split: str, made: Path) -> None:
    """Put a task's files where the benchmark's site has them."""
    base = site.folder / ("time" if split == "time" else "") / LAMP_TASKS[task].site
    for path in lamp_files.write_lamp(made, task, split=split, ids=split == "time").iterdir():
        place = base / path.name.partition("_")[0] / path.name
        place.parent.mkdir(parents=True, exist_ok=True)
        place.write_bytes(path.read_bytes())


def write_config(path: Path, backbone: Path, data: dict[str, str], **sections: Any) -> Path:
    raw: dict[str, Any] = {
        "data": data,
        "split": {"min_history": 1, "target_users": 4},
        "backbone": str(backbone),
        "task": {"max_new_tokens": 4},
        "population": SHORT,
        "groups": {**SHORT, "experts": 2},
        "users": {"epochs": 1, "tiers": {"select": False}},
        "evaluation": {"methods": [*METHODS], "resamples": 100},
    }
    path.write_text(yaml.safe_dump({**raw, **sections}), encoding="utf-8")
    return path


def read(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8"))


def official_check(golds: Path, predictions: Path, name: str) -> None:
    """What the benchmark's script asserts: the task's name, and exactly the gold ids."""
    gold, found = read(golds), read(predictions)
    assert gold["task"] == found["task"] == name
    ids = [row["id"] for row in found["golds"]]
    assert set(ids) == {row["id"] for row in gold["golds"]}
    assert len(ids) == len(set(ids))
    assert all(isinstance(row["output"], str) for row in found["golds"])


@pytest.mark.parametrize("task", TASKS)
def test_a_task_from_the_site_to_official_predictions(
    site: Any,
    backbone: Path,
    tmp_path: Path,
    task: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    split = "time" if task in ("lamp-1", "lamp-4", "lamp-5") else "user"
    publish(site, task, split, tmp_path / "made")
    there = tmp_path / "data"
    assert main(["data", "fetch", task, "--split", split, "--out", str(there), "--site", site.url, "--yes"]) == 0
    data = {"format": "lamp", "path": str(there), "task": task}
    methods = METHODS if task in TRAINED else ("base",)
    evaluation = {"methods": [*methods], "resamples": 100}
    config, out = write_config(tmp_path / "run.yaml", backbone, data, evaluation=evaluation), tmp_path / "run"
    stages = [] if task in TRAINED else ["--stages", "evaluate,report"]
    assert main(["run", str(config), "--out", str(out), *stages]) == 0, capsys.readouterr().err
    assert capsys.readouterr().out.endswith(f"{out / 'report.html'}\n")
    for method in methods:
        # All dev questions are asked, so the benchmark's own file of golds is the measure.
        found = out / "predictions" / f"{method}.lamp.json"
        official_check(there / "dev_outputs.json", found, LAMP_TASKS[task].official)
    assert set(read(out / "predictions" / "scores.lamp.json")["scores"]) >= set(methods)
    results = read(out / "results.json")
    assert {row["task"] for row in results["metrics"]} == {task}
    primary = {"classification": "accuracy", "rating": "mae", "generation": "rouge1"}[LAMP_TASKS[task].kind]
    assert {row["metric"] for row in results["metrics"] if row["primary"]} == {primary}
    labels = LAMP_TASKS[task].labels
    if labels:
        outputs = {row["output"] for row in read(out / "predictions" / f"{methods[-1]}.lamp.json")["golds"]}
        assert outputs <= set(labels)


def test_oppu_s_files_run_to_predictions_and_golds(
    backbone: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = lamp_files.write_oppu(tmp_path / "movies", "lamp-2m")
    data = {"format": "oppu", "path": str(folder), "task": "lamp-2m", "layout": "oppu"}
    config = write_config(tmp_path / "run.yaml", backbone, data, evaluation={"methods": ["base"], "resamples": 100})
    assert main(["check", str(config)]) == 0
    assert "split by the files" in " ".join(capsys.readouterr().out.split())
    assert main(["run", str(config), "--out", str(tmp_path / "run"), "--stages", "evaluate"]) == 0
    predictions = tmp_path / "run" / "predictions"
    official_check(predictions / "golds.lamp.json", predictions / "base.lamp.json", "LaMP_2M")
    tested = read(folder / "user_top_100_history.json")
    wanted = {query["id"]: query["gold"] for entry in tested for query in entry["query"]}
    assert {row["id"]: row["output"] for row in read(predictions / "golds.lamp.json")["golds"]} == wanted


def test_a_population_of_nobody_is_refused(backbone: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = lamp_files.write_oppu(tmp_path / "movies", "lamp-2m", others=0)
    data = {"format": "oppu", "path": str(folder), "task": "lamp-2m"}
    config = write_config(tmp_path / "run.yaml", backbone, data, preset="paper")
    assert main(["run", str(config), "--out", str(tmp_path / "run")]) == 2
    assert "population.train_on: 'others' selects no rows to train on" in capsys.readouterr().err


ROOT = Path(__file__).parents[1]


def test_there_is_a_config_for_each_task() -> None:
    assert {path.stem for path in (ROOT / "configs" / "lamp").glob("*.yaml")} == set(TASKS)


@pytest.mark.parametrize("task", TASKS)
def test_the_configs_hold_the_paper_s_hyperparameters(task: str) -> None:
    settings = load_config(ROOT / "configs" / "lamp" / f"{task}.yaml")
    assert (settings.preset, settings.data.task, settings.data.format) == ("paper", task, "lamp")
    assert settings.task.kind == LAMP_TASKS[task].kind
    first, second, third = settings.population, settings.groups, settings.users
    assert (first.rank, first.alpha, first.dropout, first.learning_rate, first.epochs) == (8, 16, 0.05, 3e-4, 3)
    assert (first.weight_decay, first.warmup, first.train_on) == (0.1, 0.03, "others")
    assert (second.experts, second.rank, second.alpha, second.dropout, second.user_embedding) == (5, 4, 8, 0.05, 128)
    assert (second.learning_rate, second.epochs, second.schedule, second.train_on) == (2e-4, 2, "cosine", "targets")
    assert (third.rank, third.alpha, third.learning_rate, third.epochs, third.router) == (4, 8, 2e-4, 2, "paper")
    assert (third.router_learning_rate, third.router_epochs) == (2e-4, 1)


def test_the_recipe_refuses_an_unknown_task_before_it_trains_another(tmp_path: Path) -> None:
    told = subprocess.run(
        [ROOT / "recipes" / "lamp.sh", "lamp-3", "lamp5"],
        cwd=ROOT,
        env={"PATH": "/usr/bin:/bin", "RUNS": str(tmp_path / "runs")},
        capture_output=True,
        text=True,
        check=False,
    )
    assert (told.returncode, told.stderr) == (2, "lamp5: no such task: there is no configs/lamp/lamp5.yaml\n")
    assert not (tmp_path / "runs").exists()


@pytest.mark.slow
def test_the_recipe_makes_the_table(site: Any, backbone: Path, tmp_path: Path) -> None:
    publish(site, "lamp-2n", "time", tmp_path / "made")
    short = "compute.dtype=fp32 split.target_users=2 split.min_history=1 population.epochs=1 groups.epochs=1"
    short += " users.epochs=1 users.tiers.select=false evaluation.seeds=[0] evaluation.resamples=100"
    short += " evaluation.methods=[base]"
    programs = tmp_path / "bin"
    programs.mkdir()
    for name, rest in (("python", ""), ("proper", " -m proper")):
        (programs / name).write_text(f'#!/bin/sh\nexec {sys.executable}{rest} "$@"\n')
        (programs / name).chmod(0o755)
    told = subprocess.run(
        [ROOT / "recipes" / "lamp.sh", "lamp-2n"],
        cwd=ROOT,
        env={
            **os.environ,
            "PATH": f"{programs}:{os.environ['PATH']}",
            "RUNS": str(tmp_path / "runs"),
            "DATA": str(tmp_path / "data"),
            "PROPER_LAMP_SITE": site.url,
            "SET": f"backbone={backbone} {short}",
        },
        capture_output=True,
        text=True,
        check=False,
    )
    assert told.returncode == 0, told.stderr
    assert any(line.startswith("| lamp-2n | base | accuracy ") for line in told.stdout.splitlines())
    assert (tmp_path / "runs" / "lamp-2n" / "predictions" / "base.lamp.json").is_file()
