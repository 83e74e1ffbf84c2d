"""Training loop of stages 1 and 2: gradient accumulation, clipping, learning-rate schedule, resumable checkpoints.

The loop uses `accelerate`: each process takes its share of every batch, and gradients are summed over processes. A
`TrainableStage` provides the trained parameters and the loss.
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from torch import Tensor, nn

from proper.config import OptimizerConfig, PrivacyConfig
from proper.console import progress
from proper.data.batching import Batch, RowEncoder, by_length, collate, similar_batches
from proper.data.encoder import EncodedExample
from proper.data.histories import SampledRows, TextExample
from proper.errors import NonFiniteLossError
from proper.models.memory import give_back_memory
from proper.training.checkpoint import Checkpoint, adamw_tensors, resume_adamw, seed_of
from proper.training.early_stopping import EarlyStopping
from proper.training.metrics_log import Log
from proper.training.optim import rate_factor


@dataclass(frozen=True)
class LossSum:
    """The loss of a batch: the answers' summed loss, their number of tokens, and a penalty added to the mean."""

    total: Tensor
    tokens: Tensor
    penalty: Tensor | None = None

    def objective(self, answers: Tensor | float, weight: float = 1.0) -> Tensor:
        """Return what is minimized: the share of this batch in the mean over `answers` tokens, and in the penalty."""
        mean = self.total / answers
        return mean if self.penalty is None else mean + self.penalty * weight


class TrainableStage(Protocol):
    """The interface of stages 1 and 2 to the training loop.

    Attributes:
        in_parts: whether a batch's loss is a sum over its rows, so that its gradient may be computed in parts.
    """

    name: str

    @property
    def in_parts(self) -> bool: ...  # noqa: D102

    def parameters(self) -> dict[str, nn.Parameter]:
        """Return the parameters that AdamW updates."""

    def loss(self, batch: Batch, progress: float) -> LossSum:
        """Return the loss of a batch; `progress` is the share of all steps that is done."""

    def after_backward(self, rate_factor: float) -> None:
        """Update, once per optimizer step, parameters outside AdamW (rows of absent users must not change)."""

    def state(self) -> dict[str, Tensor]:
        """Return the further tensors that a checkpoint must contain."""

    def restore(self, tensors: dict[str, Tensor]) -> None:
        """Restore the tensors of `state`."""


@dataclass(frozen=True)
class TrainingPlan:
    """Data, hyperparameters and checkpoint of a training loop, without the stage itself.

    Attributes:
        batch_tokens: tokens, padding included, that run through the model at once.
        privacy: settings, with the noise multiplier, of `train_privately`; None for `train`.
    """

    config: OptimizerConfig
    rate: float
    seed: int
    encoder: RowEncoder
    pad: int
    sample: SampledRows
    checkpoint: Checkpoint
    log: Log
    batch_tokens: int
    privacy: PrivacyConfig | None = None

    @property
    def batches_per_epoch(self) -> int:
        """ceil(rows / batch size)."""
        return -(-self.sample.size // self.config.batch_size)

    @property
    def updates(self) -> int:
        """Total number of optimizer steps."""
        return count_updates(self.sample.size, self.config)

    def has_seen_all_rows(self, step: int) -> bool:
        """Return whether the first pass is over after so many optimizer steps."""
        return step * self.config.gradient_accumulation >= self.batches_per_epoch


def count_updates(rows: int, config: OptimizerConfig) -> int:
    """Return the number of optimizer steps over all epochs of so many rows."""
    batches = round(config.epochs * -(-rows // config.batch_size))
    return max(1, -(-batches // config.gradient_accumulation))


def train(
    stage: TrainableStage, plan: TrainingPlan, accelerator: Accelerator, stopping: EarlyStopping | None = None
) -> None:
    """Train a stage to its end or until `stopping` ends it, resuming from its checkpoint if there is one.

    Raises:
        NonFiniteLossError: a step's loss or gradient is not finite; names the step and users.
    """
    parameters = stage.parameters()
    optimizer = torch.optim.AdamW(parameters.values(), lr=plan.rate, weight_decay=plan.config.weight_decay)
    done, tensors = resume_adamw(plan.checkpoint, optimizer, parameters)
    if tensors:
        stage.restore(tensors)
        if stopping is not None:
            stopping.resume(plan.checkpoint.metadata() or {}, tensors, accelerator.device)
    shown = progress if accelerator.is_main_process else _hidden
    with shown(f"{stage.name} (seed {plan.seed})", plan.updates) as advance:
        advance(done)
        for step, micro_batches in enumerate(_updates(plan, done), start=done):
            started = time.perf_counter()
            metrics = _update(stage, plan, accelerator, optimizer, step, micro_batches)
            if stopping is not None and stopping.is_due(step + 1, plan.updates):
                metrics["held_out_loss"] = round(stopping.measure(parameters, accelerator), 6)
            metrics["seconds"] = round(time.perf_counter() - started, 4)
            if accelerator.is_main_process:
                plan.log(metrics)
            advance(1, f"loss {metrics['loss']:.3f}")
            if stopping is not None and stopping.is_over and plan.has_seen_all_rows(step + 1):
                break
            if plan.checkpoint.due() and accelerator.is_main_process:
                state = {**adamw_tensors(optimizer, parameters), **stage.state()}
                held_out = {} if stopping is None else {"held_out_losses": stopping.losses}
                best = {} if stopping is None else stopping.tensors()
                plan.checkpoint.save({**state, **best}, {"step": step + 1, **held_out})
    if stopping is not None:
        stopping.restore_best(parameters)
    give_back_memory()


@contextmanager
def _hidden(title: str, total: int | None) -> Iterator[Callable[..., None]]:
    """Show no progress bar; used by all processes but the main one."""
    yield lambda *_: None


def _updates(plan: TrainingPlan, done: int) -> Iterator[list[list[TextExample]]]:
    """Yield the micro-batches of every remaining update."""
    size = plan.config.gradient_accumulation
    pending: list[list[TextExample]] = []
    count = 0
    for batch in _batches(plan):
        pending.append(batch)
        if len(pending) == size or count == plan.updates - 1 and len(pending) == _last_size(plan):
            if count >= done:
                yield pending
            pending, count = [], count + 1
            if count == plan.updates:
                return


def _last_size(plan: TrainingPlan) -> int:
    """Return the number of micro-batches of the last update, which may have fewer than the others."""
    batches = max(1, round(plan.config.epochs * plan.batches_per_epoch))
    return batches - (plan.updates - 1) * plan.config.gradient_accumulation


def _batches(plan: TrainingPlan) -> Iterator[list[TextExample]]:
    """Yield the micro-batches of one epoch after another, without end."""
    epoch = 0
    while True:
        shuffle = random.Random(seed_of(plan.seed, "batches", epoch))
        yield from similar_batches(plan.sample.rows(epoch), plan.config.batch_size, shuffle)
        epoch += 1


def _update(
    stage: TrainableStage,
    plan: TrainingPlan,
    accelerator: Accelerator,
    optimizer: torch.optim.Optimizer,
    step: int,
    micro_batches: Sequence[Sequence[TextExample]],
) -> dict[str, Any]:
    """Take one optimizer step on the mean loss over the answer tokens of all micro-batches and processes."""
    world, rank = accelerator.num_processes, accelerator.process_index
    whole = [[plan.encoder.encode(row) for row in batch[rank::world]] for batch in micro_batches]
    shares = [part for rows in whole for part in parts_of(rows, plan.batch_tokens)] if stage.in_parts else whole
    answers = _sum(accelerator, sum(r.answers for share in shares for r in share))
    set_seed(seed_of(plan.seed, stage.name, step, rank) % 2**32)
    optimizer.zero_grad(set_to_none=True)
    total, penalties, tokens = _backward(stage, plan, accelerator, step, shares, answers)
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    _sum_gradients(accelerator, parameters)
    norm = nn.utils.clip_grad_norm_(parameters, plan.config.clip)
    require_finite(norm, stage.name, step, [row for rows in whole for row in rows], "gradient's norm")
    scale = rate_factor(step, plan.updates, plan.config.warmup, plan.config.schedule)
    for group in optimizer.param_groups:
        group["lr"] = plan.rate * scale
    optimizer.step()
    stage.after_backward(scale)
    mean = _sum(accelerator, total) / answers
    return {
        "stage": stage.name,
        "seed": plan.seed,
        "step": step + 1,
        "epoch": round((step + 1) * plan.config.gradient_accumulation / plan.batches_per_epoch, 4),
        "loss": round(mean, 6),
        "penalty": round(penalties, 8),
        "gradient_norm": round(float(norm), 6),
        "learning_rate": plan.rate * scale,
        "tokens": tokens,
    }


def _backward(
    stage: TrainableStage,
    plan: TrainingPlan,
    accelerator: Accelerator,
    step: int,
    shares: Sequence[Sequence[EncodedExample]],
    answers: float,
) -> tuple[float, float, int]:
    """Add the gradients of this process's shares of a step; return their summed loss, their penalty and their tokens.

    `answers` is the step's number of answer tokens in all processes.
    """
    total, penalties, tokens = 0.0, 0.0, 0
    for share in shares:
        if not share:
            continue
        batch = collate(share, plan.pad, accelerator.device)
        loss = stage.loss(batch, step / plan.updates)
        weight = 1 / (len(shares) * accelerator.num_processes)
        objective = loss.objective(answers, weight)
        if loss.penalty is not None:
            penalties += float(loss.penalty.detach()) * weight
        require_finite(objective, stage.name, step, share)
        accelerator.backward(objective)
        total += float(loss.total.detach())
        tokens += batch.tokens
    return total, penalties, tokens


def parts_of(rows: Sequence[EncodedExample], tokens: int) -> list[list[EncodedExample]]:
    """Split a batch into parts of at most `tokens` tokens, of similar length; a batch that fits stays as it is."""
    if len(rows) * max((len(row.ids) for row in rows), default=0) <= tokens:
        return [list(rows)]
    return [[rows[at] for at in chunk] for chunk in by_length([len(row.ids) for row in rows], len(rows), tokens)]


def _sum(accelerator: Accelerator, value: float) -> float:
    if accelerator.num_processes == 1:
        return value
    tensor = torch.tensor(value, dtype=torch.float64, device=accelerator.device)
    return float(accelerator.reduce(tensor, reduction="sum"))


def _sum_gradients(accelerator: Accelerator, parameters: Sequence[nn.Parameter]) -> None:
    if accelerator.num_processes == 1:
        return
    for parameter in parameters:
        gradient = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
        parameter.grad = accelerator.reduce(gradient, reduction="sum")


def require_finite(value: Tensor, stage: str, step: int, rows: Sequence[EncodedExample], what: str = "loss") -> None:
    """Raise NonFiniteLossError, with the step and users, if a step's loss or the norm of its gradient is not finite."""
    if not bool(torch.isfinite(value)):
        users = ", ".join(sorted({row.user for row in rows})[:10])
        raise NonFiniteLossError(f"{stage}: the {what} at step {step + 1} is {float(value.detach())}; users: {users}")
