"""Measures what the shared stages reveal about a user whose rows they were trained on: membership inference of users.

    python -m experiments.residue --out FILE.json [--models 8] [--seed 0] [--users 48] [--epochs 12] [--backbone NAME]
        [--noise Z [--clip C] [--users-per-step N] [--rows-per-user R]]

After a deletion, stages 1 and 2 and the mean embedding are what is left of a user. So models of stages 1 and 2 are
trained on random halves of the users (`data.train_without` names the others), in pairs of complements: each user is in
half of the models. Every model answers all users' items as an unknown user's, with the mean embedding.

The attack is LiRA (Carlini et al. 2022) with a user instead of an example: the statistic is the mean loss per answer
token of the user's history; for each model, the others tell how it is distributed (normal, one variance for all users)
with and without the user, and the score is the log-likelihood ratio of the two. The attacker has the very items.

The file has the area under the ROC curve and the true-positive rate at 1 and 5 % false positives with intervals of
95 % by resampling users; on each user's newest items, which no model was trained on, the agreement of the most likely
first tokens between a model with the user and one without, beside that of two without, and the calibration error (ECE,
ten bins) with and without; and the seconds to train one model, which is what `data.train_without` costs. Models that
are in the file are not trained again. Data and backbone are those of `experiments.experts`.

With `--noise`, the models are trained with `privacy` at this noise multiplier, and the file has their epsilon. In any
case it has what the models are worth on the newest items: loss per answer token and accuracy of the first token, for
users with their own embedding who were trained on, beside their most frequent first token and that of all users.
`--models 1` trains one model on all users, without the attack, to measure that with more users.
"""

from __future__ import annotations

import argparse
import json
import random
import shutil
import sys
import time
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from sklearn.metrics import roc_auc_score, roc_curve
from torch import Tensor

from experiments.experts import add_options, generated, make, small_llama
from proper.adapters.store import AdapterStore
from proper.config import Config, GroupsConfig, make_config
from proper.console import quiet_libraries
from proper.data.batching import IGNORED, collate
from proper.data.dataset import Dataset, prepare
from proper.data.encoder import Encoder
from proper.data.histories import TextExample
from proper.files import write_json, write_text
from proper.layers.batch_context import RowContext
from proper.models.answer_loss import answer_loss
from proper.models.checkpoints import load_tensors
from proper.models.personal import ProperModel
from proper.models.tokenizer import configured_encoder
from proper.run_folder import RunFolder
from proper.training.metrics_log import no_log
from proper.training.stages import StageRunner

Floats = NDArray[np.float64]
RESAMPLES = 1000


def halves(users: Sequence[str], models: int, seed: int) -> list[list[str]]:
    """Return the users that each model is trained without: random halves, and after each its complement."""
    left_out = list[list[str]]()
    for at in range(models // 2):
        out = set(random.Random(f"{seed} {at}").sample(users, len(users) // 2))
        left_out += [[user for user in users if user in out], [user for user in users if user not in out]]
    return left_out


def shadow(config: Config, everyone: Dataset, left_out: Sequence[str], folder: Path, seed: int) -> dict[str, Any]:
    """Train stages 1 and 2 without some users; return every user's loss, first tokens and their probabilities."""
    names = make(folder) / "without.txt"
    write_text(names, "".join(f"{user}\n" for user in left_out))
    own = config.with_data(lambda data: data.model_copy(update={"train_without": str(names)}))
    started = time.process_time()
    with prepare(own, RunFolder(folder).data, configured_encoder(own).count) as dataset:
        runner = StageRunner(own, dataset, folder, seed, no_log)
        runner.run(["population", "groups"])
        seconds = time.process_time() - started
        model = StageRunner(own, dataset, folder, seed, no_log).trained_groups()
    found: dict[str, Any] = {"left_out": list(left_out), "seconds": round(seconds, 2)}
    if runner.guarantee is not None:
        found["privacy"] = runner.guarantee.metadata()
    return {**found, "users": answered(ShadowModel(model, runner.encoder), everyone, RunFolder(folder))}


@dataclass(frozen=True)
class ShadowModel:
    """A model of stages 1 and 2, to be asked with any embedding."""

    model: ProperModel
    encoder: Encoder

    def first_of(self, row: TextExample) -> int:
        """Return the first token of a row's answer."""
        encoded = self.encoder.encode(row)
        return encoded.ids[encoded.start]

    @torch.no_grad()
    def ask(self, rows: Sequence[TextExample], own: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Return the loss per answer token, and each row's likeliest first token, its probability, and if it is right.

        `own` (D,) is the embedding of all rows.
        """
        batch = collate([self.encoder.encode(row) for row in rows], self.model.backbone.pad_id)
        logits = self.model.answer_logits(batch, RowContext("groups", embedding=own.expand(len(rows), -1)))
        losses, tokens = answer_loss(logits, batch.labels)
        first = (batch.labels != IGNORED).int().argmax(1)
        at = torch.arange(len(rows))
        sure, token = logits[at, first].float().softmax(-1).max(-1)
        return losses.sum() / tokens.sum(), token, sure, token == batch.labels[at, first]


def answered(shadow: ShadowModel, everyone: Dataset, run: RunFolder) -> dict[str, dict[str, Any]]:
    """Return by user what the model answers with the mean embedding and, if it was trained on the user, with theirs."""
    mean = load_tensors(run.experts)[0]["mean_embedding"]
    with closing(AdapterStore(run.users.path)) as store:
        embeddings = {user: head.embedding for user, head, _ in store.heads()}
    users = [user.id for user in everyone.users()]
    usual = {user: Counter(map(shadow.first_of, everyone.history(user))) for user in users}
    most = sum(usual.values(), Counter[int]()).most_common(1)[0][0]
    found: dict[str, dict[str, Any]] = {}
    for user in users:
        rows = list(everyone.queries(user))
        _, tokens, sure, hits = shadow.ask(rows, mean)
        right = [shadow.first_of(row) for row in rows]
        found[user] = {
            "loss": float(shadow.ask(everyone.history(user), mean)[0]),
            "usual": [float(np.mean([each == answer for each in right])) for answer in _answers(usual[user], most)],
            "tokens": tokens.tolist(),
            "sure": [round(each, 5) for each in sure.tolist()],
            "right": hits.tolist(),
        }
        if user in embeddings:
            loss, _, _, hits = shadow.ask(rows, embeddings[user])
            found[user]["own"] = [float(loss), float(hits.float().mean())]
    return found


def _answers(own: Counter[int], most: int) -> tuple[int, int]:
    """Return a user's most frequent first token, the least of several, and that of all users."""
    return min(own, key=lambda token: (-own[token], token)), most


def quality(models: Sequence[dict[str, Any]]) -> dict[str, list[float]]:
    """Return loss and accuracy on the newest items of users who were trained on, and the accuracy of usual answers."""
    users = [user for user in models[0]["users"] if any("own" in model["users"][user] for model in models)]
    told = [[model["users"][user] for model in models if "own" in model["users"][user]] for user in users]
    names = ("loss", "accuracy", "usual_of_user", "usual_of_all")
    values = np.array([np.mean([[*each["own"], *each["usual"]] for each in own], 0) for own in told])
    return with_interval(lambda at: dict(zip(names, values[at].mean(0).tolist(), strict=True)), len(users))


def scores(losses: Floats, inside: NDArray[np.bool_]) -> Floats:
    """Return the log-likelihood ratio of membership for every model and user (M, U), each by the other models."""
    models, users = losses.shape
    found, without, within = np.zeros_like(losses), np.zeros_like(losses), np.zeros_like(losses)
    for at in range(models):
        others = np.arange(models) != at
        for user in range(users):
            own, member = losses[others, user], inside[others, user]
            within[at, user], without[at, user] = own[member].mean(), own[~member].mean()
    for at in range(models):
        others = np.arange(models) != at
        centre = np.where(inside[others], within[at], without[at])
        # Each user's two means were taken from the losses themselves.
        variance = np.square(losses[others] - centre).sum() / (users * (models - 3))
        gap = np.square(losses[at] - without[at]) - np.square(losses[at] - within[at])
        found[at] = gap / (2 * variance)
    return found


def rates(found: Floats, inside: NDArray[np.bool_]) -> dict[str, float]:
    """Return the area under the ROC curve, and the true-positive rate at two false-positive rates."""
    false, true, _ = roc_curve(inside.ravel(), found.ravel())
    at = {f"tpr_at_{share:.0%}": float(true[false <= share].max()) for share in (0.01, 0.05)}
    return {"auc": float(roc_auc_score(inside.ravel(), found.ravel())), **at}


def ece(sure: Floats, right: Floats) -> float:
    """Return the expected calibration error over ten bins of equal width."""
    bins = np.minimum((sure * 10).astype(int), 9)
    total = sum(abs(float((right[bins == each] - sure[bins == each]).sum())) for each in range(10))
    return total / len(sure)


def with_interval(measure: Callable[[NDArray[np.int64]], dict[str, float]], users: int) -> dict[str, list[float]]:
    """Return each figure of `measure`, which takes users' numbers, with its interval over resampled users."""
    draw = np.random.default_rng(0)
    whole = measure(np.arange(users))
    again = [measure(draw.integers(0, users, users)) for _ in range(RESAMPLES)]
    spans = {name: np.quantile([each[name] for each in again], [0.025, 0.975]) for name in whole}
    return {name: [round(value, 4), *(round(float(end), 4) for end in spans[name])] for name, value in whole.items()}


def summary(models: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Return the figures of the file from all models."""
    about = {
        "quality": quality(models),
        "seconds_to_train_again": round(float(np.mean([model["seconds"] for model in models])), 1),
        **({"privacy": models[0]["privacy"]} if "privacy" in models[0] else {}),
    }
    return about if len(models) == 1 else {**membership(models), **about}


def membership(models: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Return what the attack finds, and the agreement and calibration with and without a user."""
    users = list(models[0]["users"])
    inside = np.array([[user not in model["left_out"] for user in users] for model in models])
    losses = np.array([[model["users"][user]["loss"] for user in users] for model in models])
    found = scores(losses, inside)
    attack = with_interval(lambda at: rates(found[:, at], inside[:, at]), len(users))
    pairs = [(a, b) for a in range(len(models)) for b in range(len(models)) if a != b]
    alike = np.zeros((2, len(users)))  # of a model without the user with one that has them, and with one that has not
    for number, user in enumerate(users):
        for kind in (0, 1):
            told = [[models[at]["users"][user]["tokens"] for at in pair] for pair in pairs
                    if not inside[pair[0], number] and inside[pair[1], number] == (kind == 0)]  # fmt: skip
            alike[kind, number] = np.mean([np.equal(*two).mean() for two in told])
    agreement = with_interval(
        lambda at: {"with_without": float(alike[0, at].mean()), "without_without": float(alike[1, at].mean()),
                    "difference": float((alike[0, at] - alike[1, at]).mean())}, len(users))  # fmt: skip

    def calibration(at: NDArray[np.int64]) -> dict[str, float]:
        sides = {"without": list[float](), "with": list[float]()}
        for member, name in enumerate(sides):
            told = [models[m]["users"][users[u]] for u in at for m in range(len(models)) if inside[m, u] == member]
            sure, right = (np.concatenate([np.array(each[key], float) for each in told]) for key in ("sure", "right"))
            sides[name] = [ece(sure, right)]
        return {"ece_with": sides["with"][0], "ece_without": sides["without"][0],
                "difference": sides["with"][0] - sides["without"][0]}  # fmt: skip

    gaps = [float(losses[~inside[:, u], u].mean() - losses[inside[:, u], u].mean()) for u in range(len(users))]
    return {
        "attack": attack,
        "loss_without_minus_with": round(float(np.mean(gaps)), 4),
        "agreement": agreement,
        "calibration": with_interval(calibration, len(users)),
    }


def with_privacy(config: Config, given: argparse.Namespace) -> Config:
    """Return the config with the privacy of the command line, and without what that excludes."""
    raw = config.model_dump()
    raw["privacy"] = {
        "noise_multiplier": given.noise,
        "clip": given.clip,
        "users_per_step": given.users_per_step,
        "rows_per_user": given.rows_per_user,
    }
    raw["population"] |= {"patience": 0, "max_tokens": None}
    raw["groups"]["constraint"]["kind"] = "none"
    return make_config(raw)


def on_all_users(given: argparse.Namespace, work: Path) -> Config:
    """Write generated data of five groups, and return the config whose stage 2 trains on all of its users."""
    backbone = given.backbone or small_llama(work / "backbone")
    config = generated(make(work / "data"), 5, given.seed, given, backbone)
    groups = config.groups.model_copy(update={"experts": GroupsConfig().experts, "train_on": "all"})
    return config.model_copy(update={"groups": groups})


def main() -> int:
    """Parse the command line, measure, and write the result; return the exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m experiments.residue", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--models", type=int, default=8)
    parser.add_argument("--seed", type=int, default=0)
    add_options(parser, own_traits=0.35)
    parser.add_argument("--noise", type=float, help="noise multiplier; without it, privacy is off")
    parser.add_argument("--clip", type=float, default=0.1)
    parser.add_argument("--users-per-step", type=int, default=12)
    parser.add_argument("--rows-per-user", type=int, default=8)
    given = parser.parse_args()
    if given.models != 1 and (given.models < 4 or given.models % 2):
        parser.error("--models: 1, or an even number from 4 on")
    quiet_libraries()
    work = make(given.out.with_suffix(".work"))
    config = on_all_users(given, work)
    if given.noise is not None:
        config = with_privacy(config, given)
    told: dict[str, Any] = json.loads(given.out.read_text(encoding="utf-8")) if given.out.exists() else {}
    told.setdefault("models", [])
    with prepare(config, work / "everyone.sqlite", configured_encoder(config).count) as everyone:
        users = sorted(user.id for user in everyone.users())
        for number, left_out in enumerate(halves(users, given.models, given.seed) or [[]]):
            if number < len(told["models"]):
                continue
            folder = work / str(number)
            shutil.rmtree(folder, ignore_errors=True)  # of a call that was killed
            told["models"].append(shadow(config, everyone, left_out, folder, given.seed + number))
            shutil.rmtree(folder)
            write_json(given.out, told)
            print(f"model {number + 1} of {given.models}: {told['models'][-1]['seconds']} s", flush=True)
    told |= {"users": len(users), "summary": summary(told["models"])}
    write_json(given.out, told)
    print(json.dumps(told["summary"], indent=2))
    shutil.rmtree(work, ignore_errors=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
