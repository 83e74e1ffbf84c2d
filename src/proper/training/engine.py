"""Stage 3a for many users at once: every step trains one small batch of each resident user, each as if alone.

S users sit in the slots of one bank. A user's loss is the mean over that user's tokens, their gradient is clipped by
its own norm, and their moments, step count and schedule are their own; batches depend on (seed, user) only. A user who
finishes is handed over and the slot goes to the next. Knows nothing about tiers or stores: it fits `Job`s.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

import torch
from jaxtyping import Float
from torch import Tensor

from proper.config import UsersConfig
from proper.console import progress
from proper.data.batching import Encoded, collate
from proper.errors import NonFiniteLossError
from proper.layers.bank import AdapterBank
from proper.layers.routing import Mode, Rows
from proper.models.personal import ProperModel, answer_loss
from proper.training.checkpoint import Checkpoint, seed_of
from proper.training.loop import Log
from proper.training.optim import RowAdamW, clip_rows
from proper.training.schedule import factors

MICRO_TOKENS = 4096
"""Padded tokens that run through the model at once; more only costs memory."""


@dataclass(frozen=True)
class Job:
    """What is to be fitted for one user.

    Attributes:
        items: what the adapter is trained on.
        held: the user's own held-out items; empty: train all `epochs` and keep the last step.
        epochs: passes over the items at most.
        horizon: passes after which the schedule would reach zero; None: `epochs`.
    """

    user: str
    embedding: Float[Tensor, "D"]
    items: tuple[Encoded, ...]
    held: tuple[Encoded, ...] = ()
    epochs: int = 1
    horizon: int | None = None


@dataclass
class Progress:
    """How far a job is.

    Attributes:
        index: which of the jobs it is.
        step: optimizer steps done.
        losses: held-out loss per token before training and after each pass.
        best: the pass with the lowest held-out loss (0: before training).
        trained: training loss of the last pass, per token.
    """

    index: int
    step: int = 0
    losses: list[float] = field(default_factory=list)
    best: int = 0
    trained: float = 0.0


class Jobs(Protocol):
    """Jobs that are made when they are asked for, so that memory does not grow with the users."""

    def __len__(self) -> int: ...  # noqa: D105
    def __getitem__(self, index: int, /) -> Job: ...  # noqa: D105


Done = Callable[[Job, Progress, Float[Tensor, "P"]], None]


class Engine:
    """S slots, and the training of whoever sits in them."""

    def __init__(self, model: ProperModel, config: UsersConfig, rate: float, seed: int, slots: int, pad: int) -> None:
        self.model, self.config, self.rate, self.seed, self.pad = model, config, rate, seed, pad
        layout = model.layout(config.rank)
        self.bank = AdapterBank(layout, slots, alpha=config.alpha, trainable=True, device=model.device)
        self.optimizer = RowAdamW.of(self.bank.values, weight_decay=config.weight_decay)
        self.best = torch.zeros_like(self.bank.values)
        self.seats: list[tuple[Job, Progress] | None] = [None] * slots
        self.taken = self.steps = 0
        model.use_bank(self.bank, dropout=config.dropout)

    def run(self, jobs: Jobs, done: Done, checkpoint: Checkpoint, log: Log, title: str) -> None:
        """Fit all jobs, going on from the checkpoint. `done` may be called again for a user after a restart.

        Raises:
            NonFiniteLossError: a user's loss is not finite.
        """
        self._resume(jobs, checkpoint)
        started = time.perf_counter()
        with progress(title, len(jobs)) as advance:
            advance(self.taken - sum(seat is not None for seat in self.seats))
            while self._seat(jobs):
                facts = self._step()
                self.steps += 1
                for slot in self._pass_ended():
                    advance(self._finish(slot, done))
                seconds = round(time.perf_counter() - started, 3)
                log(
                    {
                        "stage": "users",
                        "seed": self.seed,
                        "phase": title,
                        "step": self.steps,
                        "seconds": seconds,
                        **facts,
                    }
                )
                if checkpoint.due():
                    checkpoint.save(self._tensors(), self._facts())

    def _seat(self, jobs: Jobs) -> bool:
        """Give free slots to the next users; return whether anybody sits."""
        new = []
        for slot, seat in enumerate(self.seats):
            if seat is None and self.taken < len(jobs):
                job = jobs[self.taken]
                generator = torch.Generator().manual_seed(seed_of(self.seed, "adapter", job.user))
                self.bank.fresh(slot, generator)
                self.optimizer.reset(slot)
                self.best[slot] = self.bank.values[slot]
                self.seats[slot] = (job, Progress(self.taken))
                self.taken += 1
                new.append(slot)
        self._measure(new)
        return any(seat is not None for seat in self.seats)

    def _step(self) -> dict[str, Any]:
        """One optimizer step for every resident user."""
        assert self.bank.gradients is not None
        self.bank.gradients.zero_()
        chosen = {slot: self._batch(*seat) for slot, seat in enumerate(self.seats) if seat is not None}
        tokens = {slot: sum(len(r.ids) - r.start for r in batch) for slot, batch in chosen.items()}
        work = [(slot, at, row) for slot, batch in chosen.items() for at, row in enumerate(batch)]
        losses = dict.fromkeys(chosen, 0.0)
        for micro in micro_batches(work):
            sums, _ = self._losses(micro, "fit", training=True)
            torch.autograd.backward(
                (sums / torch.tensor([float(tokens[slot]) for slot, _, _ in micro], device=sums.device)).sum()
            )
            for (slot, _, _), value in zip(micro, sums.tolist(), strict=True):
                losses[slot] += value / tokens[slot]
        self._require_finite(losses)
        slots = torch.tensor(list(chosen), device=self.bank.values.device)
        gradients = clip_rows(self.bank.gradients[slots], self.config.clip)
        self.optimizer.step(self.bank.values, slots, gradients, self.rate * self._factors(list(chosen)))
        for slot in chosen:
            _, state = self._sitting(slot)
            state.step += 1
            state.trained = losses[slot]
        mean = sum(losses.values()) / len(losses)
        return {"loss": round(mean, 6), "users": len(chosen), "tokens": sum(len(r.ids) for _, _, r in work)}

    def _batch(self, job: Job, state: Progress) -> list[Encoded]:
        """A user's next batch: it depends on the seed, the user and the step only."""
        per_pass = self._steps_per_pass(job)
        epoch, at = divmod(state.step, per_pass)
        generator = torch.Generator().manual_seed(seed_of(self.seed, "order", job.user, epoch))
        order = torch.randperm(len(job.items), generator=generator).tolist()
        size = self.config.batch_size
        return [job.items[i] for i in order[at * size : (at + 1) * size]]

    def _factors(self, slots: list[int]) -> Tensor:
        seats = [self._sitting(slot) for slot in slots]
        steps = torch.tensor([state.step for _, state in seats])
        totals = torch.tensor([self._steps_per_pass(job) * (job.horizon or job.epochs) for job, _ in seats])
        return factors(steps, totals, self.config.warmup, self.config.schedule).to(self.bank.values.device)

    def _pass_ended(self) -> list[int]:
        """Measure whoever has just ended a pass on their held-out items; return who is finished."""
        ended = []
        for slot, seat in enumerate(self.seats):
            if seat is not None and seat[1].step % self._steps_per_pass(seat[0]) == 0:
                ended.append(slot)
        self._measure(ended)
        return [slot for slot in ended if self._is_finished(slot)]

    def _is_finished(self, slot: int) -> bool:
        job, state = self._sitting(slot)
        passes = state.step // self._steps_per_pass(job)
        stalled = bool(job.held) and passes - state.best >= self.config.patience
        return stalled or passes >= job.epochs

    def _finish(self, slot: int, done: Done) -> int:
        job, state = self._sitting(slot)
        if not job.held:
            state.best = state.step // self._steps_per_pass(job)
        done(job, state, self.best[slot] if job.held else self.bank.values[slot])
        self.seats[slot] = None
        return 1

    def _measure(self, slots: list[int]) -> None:
        """Held-out loss of these slots; the best weights so far are kept."""
        for slot, loss in self.held_losses(slots, "fit").items():
            _, state = self._sitting(slot)
            state.losses.append(loss)
            if loss <= min(state.losses):
                state.best = len(state.losses) - 1
                self.best[slot] = self.bank.values[slot]

    def held_losses(self, slots: list[int], mode: Mode) -> dict[int, float]:
        """Return the held-out loss per token of the users in these slots, where they have held-out items."""
        work = [(s, at, row) for s in slots for at, row in enumerate(self._sitting(s)[0].held)]
        sums, counts = dict.fromkeys(slots, 0.0), dict.fromkeys(slots, 0.0)
        for micro in micro_batches(work):
            with torch.no_grad():
                total, tokens = self._losses(micro, mode, training=False)
            for (slot, _, _), value, count in zip(micro, total.tolist(), tokens.tolist(), strict=True):
                sums[slot] += value
                counts[slot] += count
        return {slot: sums[slot] / counts[slot] for slot in slots if counts[slot]}

    def _losses(
        self, micro: Sequence[tuple[int, int, Encoded]], mode: Mode, *, training: bool
    ) -> tuple[Float[Tensor, "B"], Float[Tensor, "B"]]:
        """Each row's summed answer loss and its tokens."""
        batch = collate([row for _, _, row in micro], self.pad, self.model.device)
        seats = [self._sitting(slot) for slot, _, _ in micro]
        embedding = torch.stack([job.embedding for job, _ in seats]).to(self.model.device)
        slots = torch.tensor([slot for slot, _, _ in micro], device=self.model.device)
        rows = Rows(mode, embedding=embedding, slots=slots)
        if training and self.config.dropout > 0:
            keys = [(job.user, state.step, at) for (job, state), (_, at, _) in zip(seats, micro, strict=True)]
            drawn = tuple(torch.Generator().manual_seed(seed_of(self.seed, "dropout", *key)) for key in keys)
            rows = replace(rows, generators=drawn, mask=batch.attention_mask.bool())
        logits = self.model.answer_logits(batch, rows)
        return answer_loss(logits, batch.labels)

    def _require_finite(self, losses: dict[int, float]) -> None:
        for slot, loss in losses.items():
            if loss != loss or loss in (float("inf"), float("-inf")):
                job, state = self._sitting(slot)
                raise NonFiniteLossError(f"users: the loss at step {state.step + 1} is {loss}; users: {job.user}")

    def _steps_per_pass(self, job: Job) -> int:
        return -(-len(job.items) // self.config.batch_size)

    def _sitting(self, slot: int) -> tuple[Job, Progress]:
        seat = self.seats[slot]
        assert seat is not None
        return seat

    def _tensors(self) -> dict[str, Tensor]:
        return {"values": self.bank.values, "best": self.best, **self.optimizer.tensors()}

    def _facts(self) -> dict[str, Any]:
        return {
            "taken": self.taken,
            "steps": self.steps,
            "seats": [None if seat is None else vars(seat[1]) for seat in self.seats],
        }

    def _resume(self, jobs: Jobs, checkpoint: Checkpoint) -> None:
        held = checkpoint.load()
        if held is None:
            return
        tensors, facts = held
        self.bank.values.copy_(tensors["values"])
        self.best.copy_(tensors["best"])
        self.optimizer.restore(tensors)
        self.taken, self.steps = facts["taken"], facts["steps"]
        for slot, seat in enumerate(facts["seats"]):
            self.seats[slot] = None if seat is None else (jobs[seat["index"]], Progress(**seat))


def micro_batches(work: Sequence[tuple[int, int, Encoded]]) -> Iterator[list[tuple[int, int, Encoded]]]:
    """Cut rows, sorted by length, into pieces of at most `MICRO_TOKENS` padded tokens."""
    held: list[tuple[int, int, Encoded]] = []
    for entry in sorted(work, key=lambda entry: -len(entry[2].ids)):
        if held and (len(held) + 1) * len(held[0][2].ids) > MICRO_TOKENS:
            yield held
            held = []
        held.append(entry)
    if held:
        yield held
