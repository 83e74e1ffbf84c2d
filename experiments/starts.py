"""Measures where new users' LoRAs start: held-out loss from zero, from the nearest users' mean and from a learnt start.

    python -m experiments.cold_start --demo FOLDER
    python -m experiments.starts FOLDER/run FOLDER/new.jsonl --out FILE.json [--users 10] [--known 16] [--steps 4]

The first makes a run with stages 1 and 2, and the items of users unknown to it. `--known` users of the run are fitted
(stage 3, on the older items of their histories); they are the neighbours, and the users that the start is learnt on.
Every new user gets a placed embedding and a LoRA from their first 2, 5 and 10 items, with the same number of steps from
each start. The loss per token is taken on the next `--ask` items after the tenth, which are the same for all. A number
of items that the file has is not measured again.
"""

from __future__ import annotations

import argparse
import random
import shutil
import sys
from collections.abc import Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from experiments.cold_start_data import histories_of
from experiments.forms import RESAMPLES, fit, make, open_stage
from proper.console import no_bar
from proper.data.encoder import EncodedExample
from proper.enrolment.fit_user import START_NEIGHBOURS, Fitter, open_fitter
from proper.files import read_json, write_json
from proper.inference import load
from proper.training.held_out import per_token
from proper.training.jobs import FitResult, Job, full_passes
from proper.training.metrics_log import no_log
from proper.training.microbatching import item_losses
from proper.training.multi_user_trainer import MultiUserTrainer
from proper.training.starts import mean_adapter, meta_start
from proper.training.user_stage import UserStage

COUNTS = (2, 5, 10)


@dataclass(frozen=True)
class Known:
    """What the starts are made of: the fitted users' adapters and embeddings (U, D), and the learnt start (P,)."""

    adapters: Sequence[Mapping[str, Tensor]]
    embeddings: Tensor
    meta: Tensor


def known(stage: UserStage) -> Known:
    """Fit the run's users, and learn the common start on them."""
    return Known(fit(stage, "lora-4")[1], stage.embeddings, meta_start(replace(stage, folder=make(stage.folder / "m"))))


def losses(
    fitter: Fitter,
    stage: UserStage,
    found: Known,
    histories: Sequence[tuple[str, list[EncodedExample]]],
    count: int,
    ask: int,
) -> dict[str, list[float]]:
    """Return every new user's loss per token on the asked items, of the group model and from each start."""
    layout = stage.model.user_layout(stage.config)
    placed = fitter.placer.place([items[:count] for _, items in histories])
    near = functional.normalize(placed, dim=1) @ functional.normalize(found.embeddings, dim=1).T

    def neighbours(at: int) -> Tensor:
        nearest = near[at].topk(START_NEIGHBOURS).indices.tolist()
        return mean_adapter([found.adapters[each] for each in nearest], layout)

    starts: dict[str, list[Tensor | None]] = {
        "zero": [None] * len(histories),
        "neighbours": [neighbours(at) for at in range(len(histories))],
        "meta": [found.meta] * len(histories),
    }
    asked = slice(max(COUNTS), max(COUNTS) + ask)
    told: dict[str, list[float]] = {}
    for name, own in starts.items():
        passes = full_passes(stage.config, count)
        jobs = [
            Job(user, placed[at], tuple(items[:count]), epochs=passes, start=own[at])
            for at, (user, items) in enumerate(histories)
        ]
        fit_jobs(stage, jobs, name)
        tests = {at: replace(job, held_out=tuple(histories[at][1][asked])) for at, job in enumerate(jobs)}
        if "group" not in told:
            told["group"] = [per_token(each) for each in item_losses(stage.model, tests, "groups", stage.pad).values()]
        told[name] = [per_token(each) for each in item_losses(stage.model, tests, "fit", stage.pad).values()]
    return told


def fit_jobs(stage: UserStage, jobs: Sequence[Job], title: str) -> None:
    """Fit the adapters of these jobs, and leave them in the model's bank, in their order."""
    trainer = MultiUserTrainer(stage.model, stage.config, stage.rate("users"), stage.seed, len(jobs), stage.pad)
    rows: dict[str, Tensor] = {}

    def done(results: Sequence[FitResult], again: bool) -> None:
        rows.update({result.user: result.row for result in results if result.row is not None})

    trainer.run(jobs, done, None, no_log, title, no_bar)
    for slot, job in enumerate(jobs):
        trainer.bank.values[slot] = rows[job.user]


def summary(told: Mapping[str, Sequence[float]]) -> dict[str, Any]:
    """Return the mean losses, and each start's difference to zero with an interval of 95 % by resampling users."""
    values = {name: torch.tensor(own, dtype=torch.float64) for name, own in told.items()}
    draw = random.Random(0)
    found: dict[str, Any] = {"loss": {name: float(own.mean()) for name, own in values.items()}}
    for name in ("neighbours", "meta"):
        moved = values[name] - values["zero"]
        means = sorted(float(moved[draw.choices(range(len(moved)), k=len(moved))].mean()) for _ in range(RESAMPLES))
        found[f"{name} - zero"] = {
            "difference": float(moved.mean()),
            "interval": [means[int(0.025 * RESAMPLES)], means[int(0.975 * RESAMPLES)]],
        }
    return found


def main() -> int:
    """Parse the command line, measure, and write the result; return the exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m experiments.starts", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("run", type=Path)
    parser.add_argument("new", type=Path)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--users", type=int, default=10)
    parser.add_argument("--known", type=int, default=16)
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--ask", type=int, default=8)
    given = parser.parse_args()
    work = given.out.with_suffix(".work")
    found: dict[str, Any] = read_json(given.out) if given.out.exists() else {"items": {}}
    with closing(open_fitter(given.run, load(given.run, "groups"))) as fitter:
        stage = open_stage(fitter, given.known, given.steps, 0.4, work)
        histories = histories_of(fitter, given.new, max(COUNTS) + given.ask)[: given.users]
        found |= {"users": len(histories), "known": len(stage.users), "steps": given.steps}
        with fitter.model.model.caching(work, 512):
            made = known(stage)
            for count in COUNTS:
                if str(count) not in found["items"]:
                    told = losses(fitter, stage, made, histories, count, given.ask)
                    found["items"][str(count)] = summary(told) | {"users": told}
                    write_json(given.out, found)
                    print(count, summary(told), flush=True)
    shutil.rmtree(work, ignore_errors=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
