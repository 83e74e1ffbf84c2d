"""Measures where new users' embeddings come from: answer loss after 0, 1, 2, 5, ... items, placed and fitted.

    python -m experiments.cold_start --demo FOLDER
    python -m experiments.cold_start RUN NEW.jsonl [--items 1 2 5] [--users 40] [--ask 8] [--out FILE.json]

The first makes FOLDER/run and FOLDER/new.jsonl: stages 1 and 2 on 120 users of the demo, and the items of 40 others.
RUN is a run folder with stage 2; NEW.jsonl has users unknown to its stages 1 and 2, with the run's user column. For
each number of items n, a user's first n items give the embedding, and the answer loss is taken on the next `--ask`
items after the largest n, which are the same for every n:

    mean         the mean embedding, which the model has for an unknown user
    placed       the run's encoder, without gradient
    mean+fit     by gradient from the mean, as before there was an encoder
    placed+fit   by gradient from the placed embedding: what an enrolment gives

`recovered` is the part of the gain of `mean+fit` over `mean` that `placed` has, with an interval of 95 % by resampling
users. The file also has the seconds that the encoder took, after the backbone's pass, for the number of users in
`--enrol` (the same users again and again).
"""

from __future__ import annotations

import argparse
import json
import random
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from proper.config import make_config
from proper.data.batching import by_length, collate
from proper.data.dataset import TextExample
from proper.data.demo import DemoSettings, demo_run, write_demo
from proper.data.encoder import EncodedExample
from proper.enrolment.fit_embedding import EmbeddingJob, FittedEmbedding, fit_embeddings
from proper.enrolment.fit_user import Fitter, open_fitter
from proper.enrolment.place import Placer, embedding_jobs
from proper.files import write_json, write_text
from proper.inference import load
from proper.interactions.parsing import read_users
from proper.layers.batch_context import RowContext
from proper.pipeline import run

RESAMPLES = 2000


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


def measure(folder: Path, path: Path, counts: Sequence[int], users: int, ask: int, enrol: int) -> dict[str, Any]:
    """Return the losses of every embedding at every number of items, and the times."""
    fitter = open_fitter(folder, load(folder, "groups"))
    try:
        histories = histories_of(fitter, path, max(counts) + ask)[:users]
        asked = [items[max(counts) :][:ask] for _, items in histories]
        mean = fitter.placer.mean.expand(len(histories), -1)
        found: dict[str, Any] = {"users": len(histories), "kind": fitter.placer.kind, "items": {}}
        base = _losses(fitter, asked, mean)
        for count in counts:
            known = [(user, items[:count]) for user, items in histories]
            losses = {"mean": base, "placed": _losses(fitter, asked, fitter.placer.place([own for _, own in known]))}
            for name, placer in (("mean+fit", Placer(fitter.model.model, fitter.placer.mean, None)),
                                 ("placed+fit", fitter.placer)):  # fmt: skip
                jobs = embedding_jobs(placer, known, fitter.model.config.users.tiers.validation)
                losses[name] = _losses(fitter, asked, _fitted(fitter, jobs))
            found["items"][str(count)] = _summary(losses)
            print(count, found["items"][str(count)], flush=True)
        found["encoder_seconds"] = _seconds(fitter, [own[: max(counts)] for _, own in histories], enrol)
        return found
    finally:
        fitter.close()


def histories_of(fitter: Fitter, path: Path, least: int) -> list[tuple[str, list[EncodedExample]]]:
    """Return the encoded items of the file's users with so many items or more."""
    config, encoder = fitter.model.config, fitter.model.encoder
    entries = read_users(path, config.data, config.task)
    return [
        (user, [encoder.encode(TextExample(0, user, each.prompt, each.target, None, None, 0)) for each in own])
        for user, own in entries.items()
        if len(own) >= least
    ]


def _fitted(fitter: Fitter, jobs: Sequence[EmbeddingJob]) -> Tensor:
    found = fit_embeddings(fitter.embedding_setting(lambda: None), jobs)
    return torch.stack([each.embedding if isinstance(each, FittedEmbedding) else fitter.placer.mean for each in found])


@torch.no_grad()
def _losses(fitter: Fitter, asked: Sequence[Sequence[EncodedExample]], embeddings: Tensor) -> list[float]:
    """Return every user's answer loss per token on the asked items."""
    model = fitter.model.model
    work = [(at, item) for at, items in enumerate(asked) for item in items]
    sums = torch.zeros(len(asked), 2, dtype=torch.float64)
    for chunk in by_length([len(item.ids) for _, item in work], 64, model.backbone.batch_tokens):
        owners = [work[at][0] for at in chunk]
        batch = collate([work[at][1] for at in chunk], model.backbone.pad_id, model.device)
        totals, tokens = model.answer_losses(batch, RowContext("groups", embedding=embeddings[owners].to(model.device)))
        sums.index_add_(0, torch.tensor(owners), torch.stack([totals, tokens], dim=1).double().cpu())
    losses: list[float] = (sums[:, 0] / sums[:, 1]).tolist()
    return losses


def _summary(losses: dict[str, list[float]]) -> dict[str, Any]:
    """Return the mean losses, and the recovered part of the gain with its interval."""
    values = {name: torch.tensor(own, dtype=torch.float64) for name, own in losses.items()}
    placed, fitted = values["mean"] - values["placed"], values["mean"] - values["mean+fit"]
    draw = random.Random(0)
    shares = []
    for _ in range(RESAMPLES):
        chosen = draw.choices(range(len(placed)), k=len(placed))
        shares.append(float(placed[chosen].sum() / fitted[chosen].sum()))
    shares.sort()
    return {
        "loss": {name: float(own.mean()) for name, own in values.items()},
        "recovered": float(placed.sum() / fitted.sum()),
        "interval": [shares[int(0.025 * RESAMPLES)], shares[int(0.975 * RESAMPLES)]],
        "users_better_than_mean": float((placed > 0).double().mean()),
    }


def _seconds(fitter: Fitter, histories: Sequence[Sequence[EncodedExample]], enrol: int) -> dict[str, float]:
    """Return the seconds of the backbone's pass for these users, and of the encoder for `enrol` of them."""
    started = time.perf_counter()
    phi = fitter.placer.read(histories)
    passed = time.perf_counter()
    fitter.placer.embed([phi[at % len(phi)] for at in range(enrol)])
    ended = time.perf_counter()
    return {"backbone": passed - started, "encoder": ended - passed, "enrolled": enrol}


def main() -> int:
    """Parse the command line, measure, and write the result if a file is given; return the exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m experiments.cold_start",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("run", type=Path, nargs="?")
    parser.add_argument("new", type=Path, nargs="?")
    parser.add_argument("--demo", type=Path, metavar="FOLDER")
    parser.add_argument("--items", type=int, nargs="+", default=[1, 2, 5])
    parser.add_argument("--users", type=int, default=40)
    parser.add_argument("--ask", type=int, default=8)
    parser.add_argument("--enrol", type=int, default=1000)
    parser.add_argument("--out", type=Path)
    given = parser.parse_args()
    if given.demo is not None:
        make_demo(given.demo)
        return 0
    if given.run is None or given.new is None:
        parser.error("give RUN and NEW.jsonl, or --demo FOLDER")
    found = measure(given.run, given.new, given.items, given.users, given.ask, given.enrol)
    print(found["encoder_seconds"])
    if given.out is not None:
        write_json(given.out, found)
    return 0


if __name__ == "__main__":
    sys.exit(main())
