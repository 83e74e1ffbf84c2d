"""Measures stage 2 trained in sequence on slices of users, so that a deletion repeats training only from one slice on.

    python -m experiments.slices --out FILE.json [--slices 1 2 4] [--seed 0] [--users 48] [--epochs 12]

Users are assigned to slices by a hash. In the way `own`, stage 2 trains on slice after slice, each with its own users'
rows; in `growing`, each step of training has the rows of all slices so far, as in SISA (Bourtoule et al. 2021, arXiv
1912.03817), with the epochs lowered so that as many rows are trained on in all. A checkpoint after each slice would let
a deletion start before the slice of the user who left. Stage 1 is trained once, on all users.

The file has, for each number of slices and way: loss per answer token and accuracy of the first token on the users'
newest items, with their own embeddings, and the loss beside that of one slice (by user, with intervals of 95 %); the
same loss by slice; the CPU seconds of stage 2; and the share of one whole training that the deletion of one user costs,
on average over users. Data and backbone are those of `experiments.experts`.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from experiments.experts import add_options, make
from experiments.residue import Floats, on_all_users, with_interval
from proper.config import Config
from proper.console import quiet_libraries
from proper.data.batching import collate
from proper.data.dataset import Dataset, prepare
from proper.enrolment.history import Rows
from proper.files import write_json
from proper.layers.batch_context import RowContext
from proper.models.answer_loss import answer_loss
from proper.models.personal import ProperModel
from proper.models.tokenizer import configured_encoder
from proper.training.checkpoint import seed_of
from proper.training.groups import first_embeddings, train_groups
from proper.training.metrics_log import no_log
from proper.training.plans import stage_plan
from proper.training.stages import StageRunner


def slices_of(users: Sequence[str], number: int) -> list[list[int]]:
    """Return the numbers of the users in each slice."""
    place = [seed_of("slice", user) % number for user in users]
    return [[at for at, own in enumerate(place) if own == each] for each in range(number)]


def trained(
    config: Config, everyone: Dataset, folder: Path, slices: Sequence[Sequence[int]], way: str, seed: int
) -> tuple[StageRunner, ProperModel, torch.Tensor, list[float]]:
    """Train stage 1, and stage 2 by slices; return the model, the users' embeddings and the seconds of each slice."""
    runner = StageRunner(config, everyone, folder, seed, no_log)
    runner.run(["population"])
    model, users = ProperModel(runner.backbone), [user.id for user in everyone.users()]
    model.add_experts(config.groups, seed_of(seed, "experts"))
    embeddings, seconds = first_embeddings(config.groups, len(users), model.embedding_size, seed), list[float]()
    growing = way == "growing"
    share = 2 / (len(slices) + 1) if growing else 1.0
    own = config.groups.model_copy(update={"epochs": config.groups.epochs * share})
    settings = config.model_copy(update={"groups": own})
    for number in range(len(slices)):
        at = sorted(user for part in slices[0 if growing else number : number + 1] for user in part)
        rows = Rows([row for user in at for row in everyone.history(users[user])], seed + number)
        plan = stage_plan("groups", settings, rows, runner.backbone, runner.encoder, folder, seed + number, no_log)
        started = time.process_time()
        names = [users[user] for user in at]
        embeddings[at] = train_groups(model, own, names, plan, runner.accelerator, embeddings[at])
        seconds.append(time.process_time() - started)
        plan.checkpoint.remove()
    return runner, model, embeddings, seconds


@torch.no_grad()
def answered(runner: StageRunner, model: ProperModel, everyone: Dataset, embeddings: torch.Tensor) -> list[list[float]]:
    """Return every user's loss per answer token and accuracy of the first token on the newest items."""
    found = []
    for at, user in enumerate(everyone.users()):
        batch = collate([runner.encoder.encode(row) for row in everyone.queries(user.id)], runner.backbone.pad_id)
        rows = len(batch.users)
        logits = model.answer_logits(batch, RowContext("groups", embedding=embeddings[at].expand(rows, -1)))
        losses, tokens = answer_loss(logits, batch.labels)
        each, first = torch.arange(rows), (batch.labels != -100).int().argmax(1)
        right = logits[each, first].argmax(-1) == batch.labels[each, first]
        found.append([float(losses.sum() / tokens.sum()), float(right.float().mean())])
    return found


def deletion_share(slices: Sequence[Sequence[int]], seconds: Sequence[float], whole: float) -> float:
    """Return the mean share of one whole training in what training again from a user's slice on costs."""
    costs = [sum(seconds[at:]) / whole for at, part in enumerate(slices) for _ in part]
    return sum(costs) / len(costs)


def measure(config: Config, everyone: Dataset, work: Path, numbers: Sequence[int], seed: int, out: Path) -> None:
    """Write the file, a row after each training; the first row is of one slice."""
    users, told = [user.id for user in everyone.users()], list[dict[str, Any]]()
    ways = [(1, "own"), *((number, way) for number in numbers for way in ("own", "growing"))]
    one = np.zeros(0)
    for number, way in ways:
        slices, folder = slices_of(users, number), make(work / f"{number} {way}")
        runner, model, embeddings, seconds = trained(config, everyone, folder, slices, way, seed)
        found = np.array(answered(runner, model, everyone, embeddings))
        losses, right = found[:, 0], found[:, 1]
        one = losses if number == 1 else one
        rows = np.stack([losses, right, losses - one], 1)
        names = ("loss", "accuracy", "loss_more_than_one_slice")
        figures = _figures(rows, names)
        whole = told[0]["seconds"] if told else sum(seconds)
        told.append(
            {
                "slices": number,
                "way": way,
                **figures,
                "loss_by_slice": [round(float(losses[part].mean()), 4) for part in slices],
                "seconds": round(sum(seconds), 2),
                "deletion_share": round(deletion_share(slices, seconds, whole), 3),
            }
        )
        print(json.dumps(told[-1]), flush=True)
        write_json(out, {"users": len(users), "seed": seed, "rows": told})
        shutil.rmtree(folder)


def _figures(rows: Floats, names: Sequence[str]) -> dict[str, list[float]]:
    """Return the mean of each column over users (U, F), with its interval."""
    return with_interval(lambda at: dict(zip(names, rows[at].mean(0).tolist(), strict=True)), len(rows))


def main() -> int:
    """Parse the command line, measure, and write the result; return the exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m experiments.slices", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--slices", type=int, nargs="+", default=[1, 2, 4])
    parser.add_argument("--seed", type=int, default=0)
    add_options(parser, own_traits=0.35)
    given = parser.parse_args()
    quiet_libraries()
    work = make(given.out.with_suffix(".work"))
    config = on_all_users(given, work)
    with prepare(config, work / "everyone.sqlite", configured_encoder(config).count) as everyone:
        measure(config, everyone, work, sorted({*given.slices} - {1}), given.seed, given.out)
    shutil.rmtree(work, ignore_errors=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
