"""Measures new users' first items: quality after 0, 1, 2, 5, ... of them, of embeddings, adapters and rivals.

    python -m experiments.cold_start --demo FOLDER
    python -m experiments.cold_start --huffpost FOLDER [--data data/huffpost-news/huffpost_news.parquet]
    python -m experiments.cold_start RUN NEW.jsonl [--items 5 1] [--users 40] [--ask 8] [--adapters] [--out FILE.json]

The first two make FOLDER/run and FOLDER/new.jsonl: stages 1 and 2 on 120 users of the demo or 54 HuffPost authors, and
the items of others. RUN is a run folder with stage 2; NEW.jsonl has users unknown to its stages 1 and 2, with the run's
user column. For each number of items n, a user's first n items are known, and the answer loss and the accuracy of
greedy answers are taken on the next `--ask` items after the largest n, which are the same for every n and method:

    mean         the mean embedding, which the model has for an unknown user (no items)
    placed       the run's encoder, without gradient
    mean+fit     by gradient from the mean, as before there was an encoder
    placed+fit   by gradient from the placed embedding: what an enrolment gives first
    usual        the user's most frequent answer (accuracy only)

and with `--adapters`:

    enrolled     placed+fit, and an adapter where it helps on held-out items: the end of an enrolment
    population   stage 1 alone, for every user alike
    oppu         stage 1, and an adapter for every user on top of it
    rag          a stage 1 trained with the 4 best earlier items (BM25) in front of every prompt, asked in the same way

`recovered` is the part of the gain of `mean+fit` over `mean` that `placed` has. Intervals of 95 % resample users. The
file also has processor seconds, for `--enrol` users with the same items again and again, and bytes of a user in fp32.
A number of items that the file has is not measured again.
"""

from __future__ import annotations

import argparse
import random
import sys
import time
from collections.abc import Sequence
from contextlib import ExitStack, closing
from dataclasses import replace
from pathlib import Path
from statistics import fmean
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import Tensor

from experiments.cold_start_data import histories_of, make_demo, make_huffpost, rag_population, texts_of, with_earlier
from experiments.forms import make
from proper.adapters.store import AdapterStore
from proper.config import UsersConfig
from proper.console import no_bar
from proper.data.batching import by_length, collate
from proper.data.encoder import EncodedExample
from proper.data.histories import TextExample
from proper.enrolment.fit_embedding import EmbeddingJob, FittedEmbedding, fit_embeddings
from proper.enrolment.fit_user import Fitter, open_fitter
from proper.enrolment.place import Placer, UserItems, embedding_jobs
from proper.files import read_json, write_json
from proper.inference import load
from proper.layers.bank import AdapterBank
from proper.layers.batch_context import RowContext
from proper.methods.per_user_lora import direct_model
from proper.models.answer_loss import answer_loss
from proper.models.personal import ProperModel
from proper.training.users import train_together

RESAMPLES = 2000

Items = Sequence[EncodedExample]
"""Items of one user, oldest first."""


def measure(run: Path, path: Path, asked: argparse.Namespace) -> dict[str, Any]:
    """Return every method's quality at every number of items, the times and the bytes; write them if a file is given.

    A number of items that the file has is not measured again.
    """
    out: Path | None = asked.out
    found: dict[str, Any] = read_json(out) if out is not None and out.exists() else {"items": {}}
    most = max(asked.items)
    with closing(open_fitter(run, load(run, "groups"))) as fitter, TemporaryDirectory() as work:
        written = texts_of(fitter, path, most + asked.ask)[: asked.users]
        histories = histories_of(fitter, path, most + asked.ask)[: asked.users]
        tests = [items[most:][: asked.ask] for _, items in histories]
        placer = fitter.placer
        found |= {"users": len(histories), "asked": asked.ask, "kind": placer.kind}
        with fitter.model.model.caching(Path(work), 1024):
            base = _scores(fitter.model.model, tests, placer.mean.expand(len(histories), -1))
            direct = direct_model(fitter.model.config, run) if asked.adapters else None
            folder = make(run.with_name(f"{run.name}-rag"))
            rag = rag_population(fitter.model.config, run, folder) if asked.adapters else None
            for count in asked.items:
                if str(count) not in found["items"]:
                    known = [(user, items[:count]) for user, items in histories]
                    scores = {"mean": base} | _embeddings(fitter, known, tests)
                    if direct is not None:
                        texts = [(user, items[:count]) for user, items in written]
                        scores |= _all_adapters(fitter, direct, known, texts, tests, Path(work) / str(count))
                    if rag is not None:
                        later = [own[most:][: asked.ask] for _, own in written]
                        earlier = [own[:count] for _, own in written]
                        scores["rag"] = _unadapted(rag, with_earlier(fitter, later, earlier))
                    users = {name: own[:, own[0].isfinite()].tolist() for name, own in scores.items()}
                    found["items"][str(count)] = _summary(scores) | {"users": users}
                    print(count, _summary(scores), flush=True)
                    if out is not None:
                        write_json(out, found)
            found["seconds"] = _seconds(fitter, [(user, items[:5]) for user, items in histories], asked.enrol)
        found["bytes"] = {"embedding": placer.mean.numel() * 4}
        found["bytes"]["adapter"] = 4 * fitter.model.model.user_layout(fitter.model.config.users).width
    return found


def _embeddings(fitter: Fitter, known: Sequence[UserItems], tests: Sequence[Items]) -> dict[str, Tensor]:
    """Return the scores (U, 2) of every embedding from these items, and of the usual answer."""
    model, placer, share = fitter.model.model, fitter.placer, fitter.model.config.users.tiers.validation
    placed = placer.place([items for _, items in known])
    found = {"placed": _scores(model, tests, placed), "usual": _usual(known, tests)}
    for name, start in (("mean+fit", Placer(model, placer.mean, None)), ("placed+fit", placer)):
        found[name] = _scores(model, tests, _fitted(fitter, embedding_jobs(start, known, share)))
    return found


def _all_adapters(
    fitter: Fitter,
    direct: ProperModel,
    known: Sequence[UserItems],
    texts: Sequence[tuple[str, Sequence[TextExample]]],
    tests: Sequence[Items],
    work: Path,
) -> dict[str, Tensor]:
    """Return the scores (U, 2) of an enrolment, and of the population without and with OPPU's adapters."""
    config = fitter.model.config
    fitted = _fitted(fitter, embedding_jobs(fitter.placer, known, config.users.tiers.validation))
    own = _adapters(fitter, texts, fitted, work / "own", None)
    none = torch.zeros(len(known), 1)
    found = {"enrolled": _scores(fitter.model.model, tests, fitted, own), "population": _unadapted(direct, tests)}
    return found | {"oppu": _scores(direct, tests, none, _adapters(fitter, texts, none, work / "oppu", direct))}


def _unadapted(direct: ProperModel, tests: Sequence[Items]) -> Tensor:
    """Return the scores (U, 2) of a model without experts for users without adapters."""
    rows = torch.zeros(len(tests), direct.user_layout(UsersConfig()).width)
    return _scores(direct, tests, torch.zeros(len(tests), 1), rows)


def _adapters(
    fitter: Fitter,
    known: Sequence[tuple[str, Sequence[TextExample]]],
    embeddings: Tensor,
    work: Path,
    direct: ProperModel | None,
) -> Tensor:
    """Return every user's adapter (U, P), 0 for who gets none; on a `direct` model without experts, all get one."""
    model, config = direct or fitter.model.model, fitter.model.config.users
    if direct is not None:
        config = config.model_copy(update={"tiers": config.tiers.model_copy(update={"select": False})})
    layout = model.user_layout(config)
    rows = torch.zeros(len(known), layout.width)
    with ExitStack() as stores:
        empty = stores.enter_context(closing(AdapterStore(make(work / "none"))))
        stages = []
        for (user, items), embedding in zip(known, embeddings, strict=True):
            scratch = stores.enter_context(closing(AdapterStore(make(work / user) / "final")))
            stage = fitter.user_stage(empty, user, items, embedding, work / user, scratch)
            stages.append(replace(stage, model=model, config=config))
        train_together(stages, no_bar)
        for row, stage in zip(rows, stages, strict=True):
            record = stage.store.get(stage.users[0])
            if record is not None and record.adapter is not None:
                layout.pack(record.adapter, row)
    return rows


def _fitted(fitter: Fitter, jobs: Sequence[EmbeddingJob]) -> Tensor:
    found = fit_embeddings(fitter.embedding_setting(lambda: None), jobs)
    return torch.stack([each.embedding if isinstance(each, FittedEmbedding) else fitter.placer.mean for each in found])


@torch.no_grad()
def _scores(model: ProperModel, tests: Sequence[Items], embeddings: Tensor, adapters: Tensor | None = None) -> Tensor:
    """Return every user's answer loss per token and accuracy of greedy answers (U, 2) on the items asked."""
    if adapters is not None:
        layout = model.user_layout(UsersConfig())
        bank = AdapterBank(layout, len(adapters), alpha=UsersConfig().alpha, trainable=False)
        bank.values.copy_(adapters)
        model.use_bank(bank)
    work = [(at, item) for at, items in enumerate(tests) for item in items]
    sums = torch.zeros(len(tests), 4, dtype=torch.float64)
    for chunk in by_length([len(item.ids) for _, item in work], 64, model.backbone.batch_tokens):
        owners = torch.tensor([work[at][0] for at in chunk])
        batch = collate([work[at][1] for at in chunk], model.backbone.pad_id, model.device)
        rows = RowContext("groups" if adapters is None else "fit", embedding=embeddings[owners], slots=owners)
        logits = model.answer_logits(batch, rows)
        losses, tokens = answer_loss(logits, batch.labels)
        right = ((logits.argmax(-1) == batch.labels) | (batch.labels == -100)).all(1)
        sums.index_add_(0, owners, torch.stack([losses, tokens, right, torch.ones_like(losses)], 1).double())
    return torch.stack([sums[:, 0] / sums[:, 1], sums[:, 2] / sums[:, 3]], 1)


def _usual(known: Sequence[UserItems], tests: Sequence[Items]) -> Tensor:
    """Return the accuracy of the user's most frequent answer, the newest of equally frequent ones (U, 2); no loss."""
    found = torch.full((len(known), 2), torch.nan, dtype=torch.float64)
    for at, ((_, items), asked) in enumerate(zip(known, tests, strict=True)):
        answers = [tuple(item.ids[item.start :]) for item in items]
        usual = max(reversed(answers), key=answers.count)
        found[at, 1] = fmean(tuple(item.ids[item.start :]) == usual for item in asked)
    return found


def _summary(scores: dict[str, Tensor]) -> dict[str, Any]:
    """Return the means with their difference to `mean`, and the recovered part of the gain; intervals over users."""
    draw = random.Random(0)
    users = len(scores["mean"])
    samples = [draw.choices(range(users), k=users) for _ in range(RESAMPLES)]

    def interval(values: Sequence[float]) -> list[float]:
        ordered = sorted(values)
        return [ordered[int(0.025 * RESAMPLES)], ordered[int(0.975 * RESAMPLES)]]

    found: dict[str, Any] = {}
    for column, metric in enumerate(("loss", "accuracy")):
        for name, own in scores.items():
            moved = own[:, column] - scores["mean"][:, column]
            if moved.isfinite().all():
                told = {"mean": float(own[:, column].mean()), "difference": float(moved.mean())}
                bounds = interval([float(moved[chosen].mean()) for chosen in samples])
                found.setdefault(metric, {})[name] = {**told, "interval": bounds}
    placed, fitted = (scores["mean"][:, 0] - scores[name][:, 0] for name in ("placed", "mean+fit"))
    shares = [float(placed[chosen].sum() / fitted[chosen].sum()) for chosen in samples]
    found |= {"recovered": float(placed.sum() / fitted.sum()), "interval": interval(shares)}
    return found | {"users_better_than_mean": float((placed > 0).double().mean())}


def _seconds(fitter: Fitter, known: Sequence[UserItems], enrol: int) -> dict[str, float]:
    """Return processor seconds: of placing and of fitting one user, and of the encoder for `enrol` users."""
    started = time.process_time()
    phi = fitter.placer.read([items for _, items in known])
    passed = time.process_time()
    fitter.placer.embed([phi[at % len(phi)] for at in range(enrol)])
    placed = time.process_time()
    _fitted(fitter, embedding_jobs(fitter.placer, known[:1], fitter.model.config.users.tiers.validation))
    ended = time.process_time()
    items = sum(len(own) for _, own in known)
    told = {"backbone_per_item": (passed - started) / items, "encoder": placed - passed, "enrolled": enrol}
    return told | {"fit_embedding_of_one": ended - placed}


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
    parser.add_argument("--huffpost", type=Path, metavar="FOLDER")
    parser.add_argument("--data", type=Path, default=Path("data/huffpost-news/huffpost_news.parquet"))
    parser.add_argument("--items", type=int, nargs="+", default=[1, 2, 5])
    parser.add_argument("--adapters", action="store_true")
    parser.add_argument("--users", type=int, default=40)
    parser.add_argument("--ask", type=int, default=8)
    parser.add_argument("--enrol", type=int, default=1000)
    parser.add_argument("--out", type=Path)
    given = parser.parse_args()
    if given.demo is not None:
        make_demo(given.demo)
        return 0
    if given.huffpost is not None:
        make_huffpost(given.huffpost, given.data)
        return 0
    if given.run is None or given.new is None:
        parser.error("give RUN and NEW.jsonl, or --demo FOLDER")
    found = measure(given.run, given.new, given)
    print(found["seconds"], found["bytes"])
    if given.out is not None:
        write_json(given.out, found)
    return 0


if __name__ == "__main__":
    sys.exit(main())
