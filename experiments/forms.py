"""Measures users' adapters of several forms and precisions: held-out loss and accuracy against bytes per user.

    python -m experiments.forms RUN --out FILE.json [--users 30] [--steps 12] [--forms lora-4 core-8 ...]

RUN is a run folder with stage 2. Every target user's newest items, `--validation` of them, are held out; adapters are
fitted to the older ones for a fixed number of steps, and measured on the held-out items (stages 1 and 2 may have read
them, for every form alike). The queries are not read. A form is `lora-R`, `core-R` (bases from stacked LoRAs),
`joint-R` (bases trained together with a core per user, for as many rows) or `shared-R` (LoRAs from one common start, as
`core-R` takes them); `@N` multiplies the learning rate by N. A form's factor on the adapter, 1 or 0.5, is chosen for
each half of the users on the other half.

The file has, for each form and precision, the bytes of an adapter, the mean over users of the loss per token and of the
accuracy of greedy answers, and against `lora-4` in fp32 the relative difference of the loss with an interval of 95 % by
resampling users, and the part of the gain over the group model that is kept. A form in the file is not measured again,
so an interrupted call goes on with the next one.
"""

from __future__ import annotations

import argparse
import math
import random
import shutil
import sys
from collections.abc import Mapping, Sequence
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any, get_args

import torch
from torch import Tensor

from proper.adapters.quantization import Storage, decode, encode
from proper.adapters.store import AdapterStore
from proper.console import no_bar
from proper.data.batching import by_length, collate
from proper.enrolment.fit_user import Fitter, open_fitter
from proper.files import make_folder, read_json, write_json
from proper.inference import load
from proper.layers.bank import AdapterBank
from proper.layers.batch_context import Mode, RowContext
from proper.layers.layout import Layout
from proper.models.answer_loss import answer_loss
from proper.training.bases import random_bases, stacked_bases
from proper.training.jobs import Job
from proper.training.microbatching import row_losses
from proper.training.optim import RowAdamW, rate_factor
from proper.training.user_stage import AdapterPhase, UserStage, fit_adapters

RESAMPLES = 2000
SCALES = (1.0, 0.5)
FORMS = ("lora-4", "core-4", "core-8", "core-16", "joint-4", "joint-8", "joint-16")
COHORT = 10
"""Users whose rows make one step of `joint`."""


def open_stage(fitter: Fitter, users: int, steps: int, validation: float, folder: Path) -> UserStage:
    """Return stage 3 of a run's target users, with so many steps and so much held out."""
    assert fitter.dataset is not None and fitter.model.served is not None
    found = [user.id for user in fitter.dataset.users("target") if user.history > 1][:users]
    heads = [fitter.model.served.store.head(user) for user in found]
    config = fitter.model.config.users
    tiers = config.tiers.model_copy(update={"validation": validation})
    return UserStage(
        model=fitter.model.model,
        config=config.model_copy(update={"steps": steps, "tiers": tiers, "storage": "fp32"}),
        dataset=fitter.dataset,
        encoder=fitter.model.encoder,
        users=found,
        embeddings=torch.stack([head.embedding for head in heads if head is not None]),
        store=AdapterStore(make(folder) / "unused"),
        folder=folder,
        seed=fitter.seed,
        checkpoint_seconds=60.0,
        log=lambda facts: None,
        bar=no_bar,
    )


def fit(stage: UserStage, form: str) -> tuple[Layout, list[Mapping[str, Tensor]]]:
    """Return the layout and every user's adapter of a form, fitted to the older items."""
    name, _, times = form.partition("@")
    kind, _, rank = name.partition("-")
    update = {"form": "lora" if kind in ("lora", "shared") else "core", "rank": int(rank)}
    stage = replace(stage, config=stage.config.model_copy(update=update), folder=make(stage.folder / form))
    if kind == "core":
        stage.model.bases = stacked_bases(replace(stage, folder=make(stage.folder.parent / "stacked")))
    elif kind == "joint":
        stage.model.bases = joint_bases(stage)
    rate = stage.rate("users") * float(times or 1)
    stage = replace(stage, config=stage.config.model_copy(update={"learning_rate": rate}))
    jobs = replace(stage.jobs(range(len(stage.users)), trial=True), measured=False)
    layout = stage.model.user_layout(stage.config)
    with closing(AdapterStore(stage.folder / "store")) as store:
        fit_adapters(stage, AdapterPhase("fit", jobs, store))
        records = [store.get(user) for user in stage.users]
    return layout, [record.adapter for record in records if record is not None and record.adapter is not None]


def joint_bases(stage: UserStage) -> dict[str, tuple[Tensor, Tensor]]:
    """Return bases from training A and B of all users together with a core per user, from random ones."""
    model, config = stage.model, stage.config
    start = random_bases(model, config, torch.Generator().manual_seed(stage.seed))
    model.bases = {name: (down.requires_grad_(), up.requires_grad_()) for name, (down, up) in start.items()}
    bank = model.add_bank(config, len(stage.users), trainable=True)
    jobs = [replace(stage.jobs([at], trial=True), measured=False)[0] for at in range(len(stage.users))]
    rate, downs, ups = stage.rate("users"), *map(list, zip(*model.bases.values(), strict=True))
    # Columns of B have mean square 1 and rows of A norm 1: relative to their size, both move alike.
    pairs = zip(downs, ups, strict=True)
    groups = [{"params": downs}, *({"params": [up], "times": down.shape[1] ** 0.5} for down, up in pairs)]
    shared, own = torch.optim.AdamW(groups, lr=rate, weight_decay=0.0), RowAdamW.of(bank.values)
    total = max(job.steps_per_pass(config.batch_size) * job.epochs for job in jobs)
    for step in range(total):
        for at in range(0, len(jobs), COHORT):
            cohort = dict(list(enumerate(jobs))[at : at + COHORT])
            now = rate * rate_factor(step, total, config.warmup, config.schedule)
            for group in shared.param_groups:
                group["lr"] = now * group.get("times", 1.0)
            _joint_step(stage, bank, cohort, step, now, shared, own)
    return {
        name: (torch.linalg.qr(down.detach().mT).Q.mT.contiguous(), torch.linalg.qr(up.detach()).Q * math.sqrt(len(up)))
        for name, (down, up) in model.bases.items()
    }


def _joint_step(
    stage: UserStage,
    bank: AdapterBank,
    cohort: Mapping[int, Job],
    step: int,
    rate: float,
    shared: torch.optim.Optimizer,
    own: RowAdamW,
) -> None:
    assert bank.gradients is not None
    bank.gradients.zero_()
    shared.zero_grad()
    work = [(slot, at, row) for slot, job in cohort.items()
            for at, row in enumerate(job.batch(stage.seed, step, stage.config.batch_size))]  # fmt: skip
    sums, tokens = row_losses(stage.model, cohort, work, "fit", stage.pad)
    torch.autograd.backward((sums / tokens).sum() / stage.config.batch_size)
    shared.step()
    slots = torch.tensor(list(cohort))
    own.step(bank.values, slots, bank.gradients[slots], rate)


@torch.no_grad()
def measure(
    stage: UserStage, layout: Layout | None, adapters: Sequence[Mapping[str, Tensor]], scale: float, storage: Storage
) -> Tensor:
    """Return every user's held-out loss per token and accuracy (U, 2); without a layout, of the group model."""
    model, jobs = stage.model, [stage.jobs([at], trial=True)[0] for at in range(len(stage.users))]
    if layout is not None:
        bank = AdapterBank(layout, len(jobs), alpha=stage.config.alpha, trainable=False)
        for slot, adapter in enumerate(adapters):
            layout.pack(decode(encode(scaled(adapter, scale), storage)), bank.values[slot])
        model.use_bank(bank)
    work = [(slot, row) for slot, job in enumerate(jobs) for row in job.held_out]
    sums = torch.zeros(len(jobs), 4, dtype=torch.float64)
    for chunk in by_length([len(row.ids) for _, row in work], 32, model.backbone.batch_tokens):
        batch = collate([work[at][1] for at in chunk], stage.pad, model.device)
        slots = torch.tensor([work[at][0] for at in chunk])
        mode: Mode = "groups" if layout is None else "fit"
        logits = model.answer_logits(batch, RowContext(mode, embedding=stage.embeddings[slots], slots=slots))
        losses, tokens = answer_loss(logits, batch.labels)
        right = ((logits.argmax(-1) == batch.labels) | (batch.labels == -100)).all(1)
        sums.index_add_(0, slots, torch.stack([losses, tokens, right, torch.ones_like(losses)], 1).double())
    return torch.stack([sums[:, 0] / sums[:, 1], sums[:, 2] / sums[:, 3]], 1)


def scaled(adapter: Mapping[str, Tensor], scale: float) -> dict[str, Tensor]:
    """Return an adapter whose product is `scale` times as large."""
    return {name: own * scale if name.endswith((".B", ".C")) else own for name, own in adapter.items()}


def curve(stage: UserStage, form: str) -> dict[str, Any]:
    """Return per precision the bytes, and every user's loss and accuracy at the factor that other users chose."""
    layout, adapters = fit(stage, form)
    exact = {scale: measure(stage, layout, adapters, scale, "fp32") for scale in SCALES}
    halves = [torch.arange(len(adapters)) % 2 == half for half in (0, 1)]
    chosen = [min(SCALES, key=lambda scale: float(exact[scale][~half, 0].mean())) for half in halves]
    found: dict[str, Any] = {"scales": chosen, "precisions": {}}
    for storage in get_args(Storage):
        users = torch.zeros(len(adapters), 2, dtype=torch.float64)
        for half, scale in zip(halves, chosen, strict=True):
            values = exact[scale] if storage == "fp32" else measure(stage, layout, adapters, scale, storage)
            users[half] = values[half]
        size = sum(tensor.nbytes for tensor in encode(adapters[0], storage).values())
        found["precisions"][storage] = {"bytes": size, "users": users.tolist()}
    return found


def summary(found: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Return a row for each form and precision, against `lora-4` in fp32."""
    group = torch.tensor(found["group"], dtype=torch.float64)
    base = torch.tensor(found["forms"]["lora-4"]["precisions"]["fp32"]["users"], dtype=torch.float64)
    whole = found["forms"]["lora-4"]["precisions"]["fp32"]["bytes"]
    rows = []
    for form, one in found["forms"].items():
        for storage, told in one["precisions"].items():
            own = torch.tensor(told["users"], dtype=torch.float64)
            rows.append({"form": form, "precision": storage, "bytes": told["bytes"], "part": told["bytes"] / whole}
                        | {"loss": float(own[:, 0].mean()), "accuracy": float(own[:, 1].mean())}
                        | _against(own[:, 0], base[:, 0], group[:, 0]))  # fmt: skip
    only = {"form": "e_u alone", "precision": "fp32", "bytes": 0, "part": 0.0}
    rows.append(only | {"loss": float(group[:, 0].mean()), "accuracy": float(group[:, 1].mean())}
                | _against(group[:, 0], base[:, 0], group[:, 0]))  # fmt: skip
    return rows


def _against(own: Tensor, base: Tensor, group: Tensor) -> dict[str, Any]:
    draw, values = random.Random(0), []
    for _ in range(RESAMPLES):
        chosen = draw.choices(range(len(own)), k=len(own))
        values.append(float((own[chosen] - base[chosen]).sum() / base[chosen].sum()))
    values.sort()
    kept = float((group - own).sum() / (group - base).sum())
    relative = float((own - base).sum() / base.sum())
    interval = [values[int(0.025 * RESAMPLES)], values[int(0.975 * RESAMPLES)]]
    return {"relative": relative, "interval": interval, "gain_kept": kept}


def make(folder: Path) -> Path:
    """Create a folder and return it."""
    make_folder(folder)
    return folder


def main() -> int:
    """Parse the command line, measure, and write the result; return the exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m experiments.forms", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("run", type=Path)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--users", type=int, default=30)
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--validation", type=float, default=0.4)
    parser.add_argument("--forms", nargs="+", default=FORMS)
    given = parser.parse_args()
    work = given.out.with_suffix(".work")
    found: dict[str, Any] = read_json(given.out) if given.out.exists() else {"forms": {}}
    with closing(open_fitter(given.run, load(given.run, "groups"))) as fitter:
        stage = open_stage(fitter, given.users, given.steps, given.validation, work)
        with fitter.model.model.caching(work, 1024):
            found |= {"users": len(stage.users), "embedding_bytes": stage.embeddings[0].nbytes, "steps": given.steps}
            if "group" not in found:
                found["group"] = measure(stage, None, [], 1.0, "fp32").tolist()
            for form in given.forms:
                if form not in found["forms"]:
                    found["forms"][form] = curve(stage, form)
                    found["rows"] = summary(found) if "lora-4" in found["forms"] else []
                    write_json(given.out, found)
                    print(form, *(row for row in found["rows"] if row["form"] == form), sep="\n", flush=True)
    shutil.rmtree(work, ignore_errors=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
