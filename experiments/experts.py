"""Measures `groups.experts: auto`: the number of experts that it finds on generated data, against the planted number.

    python -m experiments.experts --out FILE.json [--planted 2 3 5 8 12] [--seeds 0 1 2] [--own-traits 0.35]

Users are those of the demo: on four topics they answer as their group does; `--own-traits` is the share of their items
on three others, on which each answers as they like. Each text is replaced by the name of its topic, so that a small
model can learn it: the question is the number of groups, not the language. Without `--backbone`, the model is a small
Llama with random weights, on which stages 1 and 2 are trained.

Only the first of the two trainings of `auto` is run, the one that finds the number. The file has, per planted number
and seed, the number found, the silhouettes, the normalized mutual information between the planted groups and as many
k-means clusters, and the mean loss per answer token of the last epoch. What is in the file is not measured again.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
from collections.abc import Mapping
from contextlib import closing
from dataclasses import asdict
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from sklearn.cluster import KMeans
from sklearn.metrics import normalized_mutual_info_score
from transformers import LlamaConfig, LlamaForCausalLM

from proper.adapters.store import AdapterStore
from proper.config import Config, GroupsConfig, make_config
from proper.console import quiet_libraries
from proper.data.dataset import prepare
from proper.data.demo import DemoSettings, demo_run, write_demo
from proper.evaluation.truth import read_truth
from proper.files import make_folder, read_json, write_json, write_text
from proper.models.tokenizer import configured_encoder, load_tokenizer
from proper.run_folder import RunFolder
from proper.training.expert_count import count_experts, user_scores
from proper.training.stages import StageRunner

MAX_EXPERTS = GroupsConfig(experts="auto").expert_count


def small_llama(folder: Path) -> str:
    """Write a Llama with random weights and `proper-nano`'s tokenizer into a folder, unless it is there."""
    if not folder.exists():
        torch.manual_seed(0)
        tokenizer = load_tokenizer("proper-nano")
        config = LlamaConfig(
            hidden_size=64,
            intermediate_size=128,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=4,
            vocab_size=len(tokenizer),
            max_position_embeddings=64,
            initializer_range=0.2,
            pad_token_id=tokenizer.pad_token_id,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
        )
        LlamaForCausalLM(config).save_pretrained(folder)
        tokenizer.save_pretrained(folder)
    return str(folder)


def generated(folder: Path, planted: int, seed: int, given: argparse.Namespace, backbone: str) -> Config:
    """Write the users' interactions into a folder, each text replaced by its topic; return the config of a run."""
    settings = DemoSettings(users=given.users, groups=planted, seed=seed, own_traits=given.own_traits)
    path = write_demo(folder, settings)
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    split = [dict(zip(("input", "output"), row["output"].split(), strict=True)) for row in rows]
    write_text(path, "".join(json.dumps({**row, **own}) + "\n" for row, own in zip(rows, split, strict=True)))
    raw = demo_run(path.resolve(), settings)
    raw["data"]["prompt"] = "{input}:"
    del raw["task"]["labels"]
    raw["split"]["target_users"] = given.users
    raw["population"]["max_tokens"] = 3000
    raw["groups"] |= {"epochs": given.epochs, "batch_size": 64, "experts": MAX_EXPERTS, "user_encoder": False}
    raw["groups"] |= {"learning_rate": given.rates[0], "embedding_learning_rate": given.rates[1]}
    if given.backbone is None:  # the demo leaves the lower layers of its backbone without experts; this one has two
        raw["groups"]["layers"] = raw["users"]["layers"] = "all"
    return make_config({**raw, "backbone": backbone, "compute": {"dtype": "fp32", "device": "cpu"}})


def measure(folder: Path, planted: int, seed: int, given: argparse.Namespace, backbone: str) -> dict[str, Any]:
    """Train stages 1 and 2 with as many experts as `auto` does first; return what it would find."""
    config = generated(make(folder / "data"), planted, seed, given, backbone)
    losses = list[float]()

    def log(step: Mapping[str, Any]) -> None:
        if step["stage"] == "groups" and step["epoch"] > given.epochs - 1:
            losses.append(step["loss"])

    with prepare(config, RunFolder(folder).data, configured_encoder(config).count) as dataset:
        runner = StageRunner(config, dataset, folder, seed, log)
        runner.run(["population", "groups"])
        model = runner.trained_groups()
    with closing(AdapterStore(RunFolder(folder).users.path)) as store:
        heads = {user: head.embedding for user, head, _ in store.heads()}
    groups = read_truth(RunFolder(folder).demo_truth).groups
    scores = user_scores(model, torch.stack([*heads.values()]))
    clusters = KMeans(planted, n_init=10, random_state=0).fit_predict(scores.numpy())
    nmi = float(normalized_mutual_info_score([groups[user] for user in heads], clusters))
    found = asdict(count_experts(scores, MAX_EXPERTS, GroupsConfig().expert_count))
    return {"planted": planted, "seed": seed, **found, "nmi": round(nmi, 3), "loss": round(fmean(losses), 3)}


def make(folder: Path) -> Path:
    """Create a folder and return it."""
    make_folder(folder)
    return folder


def add_options(parser: argparse.ArgumentParser, own_traits: float) -> None:
    """Add the options of the generated data and of the training on it."""
    parser.add_argument("--users", type=int, default=48)
    parser.add_argument("--epochs", type=float, default=12)
    parser.add_argument("--rates", type=float, nargs=2, default=[1e-2, 0.2], help="of the experts, of the embeddings")
    parser.add_argument("--own-traits", type=float, default=own_traits)
    parser.add_argument("--backbone")


def main() -> int:
    """Parse the command line, measure, and write the result; return the exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m experiments.experts", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--planted", type=int, nargs="+", default=[2, 3, 5, 8, 12])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    add_options(parser, own_traits=0.0)
    given = parser.parse_args()
    quiet_libraries()
    work = make(given.out.with_suffix(".work"))
    backbone = given.backbone or small_llama(work / "backbone")
    model = given.backbone or "random Llama, 2 layers"
    setting = {"users": given.users, "own_traits": given.own_traits, "epochs": given.epochs}
    setting |= {"rates": given.rates, "backbone": model}
    told: dict[str, Any] = read_json(given.out) if given.out.exists() else {"runs": []}
    if told.setdefault("setting", setting) != setting:
        parser.error(f"{given.out}: was measured with {told['setting']}; choose another file")
    for seed in given.seeds:
        for planted in given.planted:
            if any((run["planted"], run["seed"]) == (planted, seed) for run in told["runs"]):
                continue
            folder = work / f"{planted}-{seed}"
            run = measure(folder, planted, seed, given, backbone)
            shutil.rmtree(folder)
            told["runs"].append(run)
            told["within_one"] = sum(abs(each["experts"] - each["planted"]) <= 1 for each in told["runs"])
            write_json(given.out, told)
            print({key: run[key] for key in ("planted", "seed", "experts", "nmi", "loss", "reason")}, flush=True)
    shutil.rmtree(work, ignore_errors=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
