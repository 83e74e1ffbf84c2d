"""Stage 3b training: the LoRA-aware router, one W_r per module for all users, on frozen adapters (method: stage 3).

Users are processed in cohorts that fit the bank; a step combines small batches of several users. The `load` callback
puts a user's adapter into a slot.

`recipes/stage3b_router.py` is the same as one flat loop.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from proper.config import UsersConfig
from proper.console import progress
from proper.data.batching import collate
from proper.data.encoder import EncodedExample
from proper.layers.bank import AdapterBank
from proper.layers.batch_context import RowContext
from proper.models.personal import ProperModel
from proper.training.checkpoint import Checkpoint, adamw_tensors, resume_adamw, seed_of
from proper.training.jobs import Job, Jobs
from proper.training.metrics_log import Log
from proper.training.optim import rate_factor
from proper.training.trainer import require_finite

ROWS_PER_STEP = 32
"""Rows of one optimizer step, of several users."""

Load = Callable[[str, Float[Tensor, "P"]], None]
"""Function that puts a user's adapter into a row of the bank."""

StepRows = list[tuple[int, Job, EncodedExample]]
"""The rows of a step, each with its slot and its user's job."""


@dataclass(frozen=True)
class RouterPlan:
    """Hyperparameters of stage 3b; `rows` is the number of rows over all epochs."""

    config: UsersConfig
    rate: float
    seed: int
    pad: int
    slots: int
    rows: int
    checkpoint: Checkpoint
    log: Log


def train_router(model: ProperModel, jobs: Jobs, load: Load, plan: RouterPlan, title: str) -> None:
    """Train W_r in place from zero on the items of `jobs`, with the adapters that `load` provides.

    Raises:
        NonFiniteLossError: a step's loss or gradient is not finite.
    """
    parameters = model.router_parameters()
    optimizer = torch.optim.AdamW(parameters.values(), lr=plan.rate, weight_decay=0.0)
    for parameter in parameters.values():
        parameter.data.zero_()
        parameter.requires_grad_(True)
    done, _ = resume_adamw(plan.checkpoint, optimizer, parameters)
    bank = model.add_bank(plan.config, plan.slots)
    with progress(title, plan.rows) as advance:
        for step, (seen, work) in enumerate(_steps(jobs, bank, load, plan, done), start=done):
            for group in optimizer.param_groups:
                group["lr"] = plan.rate * rate_factor(seen, plan.rows, plan.config.warmup, plan.config.schedule)
            optimizer.zero_grad()
            loss = _loss(model, work, plan.pad)
            rows = [row for _, _, row in work]
            require_finite(loss, "router", step, rows)
            torch.autograd.backward(loss)
            norm = torch.nn.utils.clip_grad_norm_(parameters.values(), plan.config.clip)
            require_finite(norm, "router", step, rows, "gradient's norm")
            optimizer.step()
            value = round(float(loss.detach()), 6)
            plan.log({"stage": "router", "seed": plan.seed, "phase": title, "step": step + 1, "loss": value})
            advance(len(work))
            if plan.checkpoint.due():
                plan.checkpoint.save(adamw_tensors(optimizer, parameters), {"step": step + 1})
    for parameter in parameters.values():
        parameter.requires_grad_(False)


def _loss(model: ProperModel, work: StepRows, pad: int) -> Tensor:
    """Return the mean loss per answer token over all rows of a step."""
    batch = collate([row for _, _, row in work], pad, model.device)
    slots = torch.tensor([slot for slot, _, _ in work], device=model.device)
    embedding = torch.stack([job.embedding for _, job, _ in work]).to(model.device)
    total, tokens = model.answer_losses(batch, RowContext("users", embedding=embedding, slots=slots))
    return total.sum() / tokens.sum()


def _steps(jobs: Jobs, bank: AdapterBank, load: Load, plan: RouterPlan, done: int) -> Iterator[tuple[int, StepRows]]:
    """Yield, for every remaining step, the number of rows before it and its rows, with their users' adapters loaded."""
    step = seen = 0
    for epoch in range(plan.config.router_epochs):
        shuffle = random.Random(seed_of(plan.seed, "router", epoch))
        order = list(range(len(jobs)))
        shuffle.shuffle(order)
        for at in range(0, len(order), plan.slots):
            cohort = [jobs[index] for index in order[at : at + plan.slots]]
            work = [(slot, job, row) for slot, job in enumerate(cohort) for row in job.items]
            shuffle.shuffle(work)
            cuts = [work[i : i + ROWS_PER_STEP] for i in range(0, len(work), ROWS_PER_STEP)]
            if step + len(cuts) > done:
                for slot, job in enumerate(cohort):
                    load(job.user, bank.values[slot])
            for cut in cuts:
                if step >= done:
                    yield seen, cut
                step, seen = step + 1, seen + len(cut)
