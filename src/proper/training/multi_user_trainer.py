"""Stage 3a training: fits LoRA adapters of many users at once; each step trains one small batch of each user in a slot.

S users occupy the slots of one bank, each trained as if alone. A user's loss is the mean over that user's tokens, the
gradient is clipped by its own norm, and moments, step count and schedule are per user; batches depend on (seed, user)
only. When a user is finished, the slot goes to the next job. A user whose loss or gradient is not finite goes into
quarantine, and the step is repeated without that user.

Results are passed to `done` right after a checkpoint that includes them. After a kill at any moment, users whose
results were not passed on resume from the checkpoint, and the others are not trained again.
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from proper.config import UsersConfig
from proper.console import Bar, progress
from proper.data.batching import collate
from proper.data.encoder import EncodedExample
from proper.layers.bank import AdapterBank
from proper.layers.batch_context import Mode, RowContext
from proper.models.personal import ProperModel, answer_loss
from proper.training.checkpoint import Checkpoint, seed_of
from proper.training.jobs import Done, FitProgress, FitResult, Job, Jobs, refusal
from proper.training.memory import pending_rows
from proper.training.microbatching import Work, micro_batches, padded_tokens
from proper.training.optim import RowAdamW, clip_row_
from proper.training.schedule import factors
from proper.training.trainer import Log

logger = logging.getLogger(__name__)

Bad = dict[int, str]
"""Slots whose users cannot be trained further, and the reasons."""


class MultiUserTrainer:
    """Trains the users in the S slots of a bank."""

    def __init__(self, model: ProperModel, config: UsersConfig, rate: float, seed: int, slots: int, pad: int) -> None:
        self.model, self.config, self.rate, self.seed, self.pad = model, config, rate, seed, pad
        dtype = torch.promote_types(model.backbone.model.dtype, torch.float32)
        self.bank = AdapterBank(
            model.layout(config.rank), slots, alpha=config.alpha, trainable=True, device=model.device, dtype=dtype
        )
        self.optimizer = RowAdamW.of(self.bank.values, weight_decay=config.weight_decay)
        self.best = torch.zeros_like(self.bank.values)
        self.seats: list[tuple[Job, FitProgress] | None] = [None] * slots
        self.pending: list[FitResult] = []
        self.taken = self.steps = 0
        model.use_bank(self.bank, dropout=config.dropout)

    def run(self, jobs: Jobs, done: Done, checkpoint: Checkpoint, log: Log, title: str, bar: Bar = progress) -> None:
        """Fit all jobs, resuming from the checkpoint; `done` gets several results at a time, `bar` shows progress."""
        self._resume(jobs, checkpoint)
        self._hand_over(done, again=True)
        started, limit, shown = time.perf_counter(), pending_rows(self.bank), 0
        with bar(title, len(jobs)) as advance:
            while self._seat(jobs):
                facts = self._step()
                if facts is None:
                    continue
                self._pass_ended()
                advance(self._finished() - shown)
                shown = self._finished()
                seconds = round(time.perf_counter() - started, 3)
                said = {"stage": "users", "seed": self.seed, "phase": title, "step": self.steps}
                log({**said, "seconds": seconds, **facts})
                if checkpoint.due() or len(self.pending) >= limit:
                    checkpoint.save(self._tensors(), self._facts())
                    self._hand_over(done)
            advance(self._finished() - shown)
            if self.pending:
                checkpoint.save(self._tensors(), self._facts())
                self._hand_over(done)

    def _finished(self) -> int:
        return self.taken - sum(seat is not None for seat in self.seats)

    def _hand_over(self, done: Done, again: bool = False) -> None:
        if self.pending:
            done(self.pending, again)
        self.pending = []

    def _seat(self, jobs: Jobs) -> bool:
        """Assign free slots to the next jobs; return whether any slot is occupied."""
        while new := self._take(jobs):
            self._measure(new)
        return any(seat is not None for seat in self.seats)

    def _take(self, jobs: Jobs) -> list[int]:
        """Fill the free slots and return them; jobs that cannot be run at all go into quarantine."""
        longest = getattr(self.model.backbone.model.config.get_text_config(), "max_position_embeddings", None)
        new = []
        while self.taken < len(jobs) and None in self.seats:
            job, state = jobs[self.taken], FitProgress(self.taken)
            self.taken += 1
            reason = refusal(job, longest)
            if reason is not None:
                self._quarantine(job, state, reason)
                continue
            slot = self.seats.index(None)
            generator = torch.Generator().manual_seed(seed_of(self.seed, "adapter", job.user))
            self.bank.fresh(slot, generator)
            self.optimizer.reset(slot)
            self.best[slot] = self.bank.values[slot]
            self.seats[slot] = (job, state)
            new.append(slot)
        return new

    def _step(self) -> dict[str, Any] | None:
        """Take one optimizer step for all users in slots; if a user is quarantined, update nothing and return None."""
        chosen = {slot: self._batch(*seat) for slot, seat in enumerate(self.seats) if seat is not None}
        losses, tokens, padded = self._backward(chosen)
        assert self.bank.gradients is not None
        bad = {slot: "quarantined: the loss is not finite" for slot, loss in losses.items() if not math.isfinite(loss)}
        for slot in chosen:
            if not math.isfinite(clip_row_(self.bank.gradients[slot], self.config.clip)):
                bad.setdefault(slot, "quarantined: the gradient is not finite")
        if bad:
            self._remove(bad)
            return None
        slots = torch.tensor(list(chosen))
        gradients = (self.bank.gradients[slot] for slot in chosen)
        self.optimizer.step(self.bank.values, slots, gradients, self.rate * self._factors(list(chosen)))
        self.steps += 1
        for slot in chosen:
            _, state = self.sitting(slot)
            state.step += 1
            state.trained = losses[slot]
        mean = sum(losses.values()) / len(losses)
        return {"loss": round(mean, 6), "users": len(chosen), "tokens": tokens, "padded": padded}

    def _backward(self, chosen: dict[int, list[EncodedExample]]) -> tuple[dict[int, float], int, int]:
        """Fill the bank's gradients; return each slot's loss, and the number of tokens without and with padding."""
        assert self.bank.gradients is not None
        self.bank.gradients.zero_()
        answers = {slot: sum(len(r.ids) - r.start for r in batch) for slot, batch in chosen.items()}
        work = [(slot, at, row) for slot, batch in chosen.items() for at, row in enumerate(batch)]
        losses = dict.fromkeys(chosen, 0.0)
        pieces = list(micro_batches(work))
        for piece in pieces:
            sums, _ = self._losses(piece, "fit", training=True)
            shares = torch.tensor([answers[slot] for slot, _, _ in piece], dtype=sums.dtype, device=sums.device)
            torch.autograd.backward((sums / shares).sum())
            for (slot, _, _), value in zip(piece, sums.tolist(), strict=True):
                losses[slot] += value / answers[slot]
        return losses, sum(len(r.ids) for _, _, r in work), padded_tokens(pieces)

    def _quarantine(self, job: Job, state: FitProgress, reason: str) -> None:
        logger.warning(f"proper: user {job.user!r}: {reason} (step {state.step + 1}); they stay on the group tier")
        self.pending.append(FitResult(job.user, job.embedding, len(job.items), state, None, reason))

    def _remove(self, bad: Bad) -> None:
        for slot, reason in bad.items():
            self._quarantine(*self.sitting(slot), reason)
            self.seats[slot] = None

    def _batch(self, job: Job, state: FitProgress) -> list[EncodedExample]:
        """Return a user's next batch, which depends on the seed, the user and the step only."""
        per_pass = self._steps_per_pass(job)
        epoch, at = divmod(state.step, per_pass)
        generator = torch.Generator().manual_seed(seed_of(self.seed, "order", job.user, epoch))
        order = torch.randperm(len(job.items), generator=generator).tolist()
        size = self.config.batch_size
        return [job.items[i] for i in order[at * size : (at + 1) * size]]

    def _factors(self, slots: list[int]) -> Tensor:
        seats = [self.sitting(slot) for slot in slots]
        steps = torch.tensor([state.step for _, state in seats])
        totals = torch.tensor([self._steps_per_pass(job) * (job.horizon or job.epochs) for job, _ in seats])
        return factors(steps, totals, self.config.warmup, self.config.schedule).to(self.bank.values.device)

    def _pass_ended(self) -> None:
        """Compute the held-out loss of users who have just ended a pass, and free the slots of finished users."""
        ended = []
        for slot, seat in enumerate(self.seats):
            if seat is not None and seat[1].step % self._steps_per_pass(seat[0]) == 0:
                ended.append(slot)
        self._measure(ended)
        for slot in ended:
            if self.seats[slot] is not None and self._is_finished(slot):
                self._finish(slot)

    def _is_finished(self, slot: int) -> bool:
        job, state = self.sitting(slot)
        passes = state.step // self._steps_per_pass(job)
        stalled = bool(job.held) and passes - state.best >= self.config.patience
        return stalled or passes >= job.epochs

    def _finish(self, slot: int) -> None:
        job, state = self.sitting(slot)
        if not job.held:
            state.best = state.step // self._steps_per_pass(job)
        row = (self.best if job.held else self.bank.values)[slot].cpu().clone()
        self.pending.append(FitResult(job.user, job.embedding, len(job.items), state, row))
        self.seats[slot] = None

    def _measure(self, slots: list[int]) -> None:
        """Record the held-out loss of these slots, and keep the best weights so far."""
        bad: Bad = {}
        for slot, loss in self.held_losses(slots, "fit").items():
            _, state = self.sitting(slot)
            if not math.isfinite(loss):
                bad[slot] = "quarantined: the held-out loss is not finite"
                continue
            state.losses.append(loss)
            if loss <= min(state.losses):
                state.best = len(state.losses) - 1
                self.best[slot] = self.bank.values[slot]
        self._remove(bad)

    def held_losses(self, slots: list[int], mode: Mode) -> dict[int, float]:
        """Return the held-out loss per token of those of these slots whose users have held-out items."""
        work = [(s, at, row) for s in slots for at, row in enumerate(self.sitting(s)[0].held)]
        sums, counts = dict.fromkeys(slots, 0.0), dict.fromkeys(slots, 0.0)
        for micro in micro_batches(work):
            with torch.no_grad():
                total, tokens = self._losses(micro, mode, training=False)
            for (slot, _, _), value, count in zip(micro, total.tolist(), tokens.tolist(), strict=True):
                sums[slot] += value
                counts[slot] += count
        return {slot: sums[slot] / counts[slot] for slot in slots if counts[slot]}

    def _losses(
        self, micro: Sequence[Work], mode: Mode, *, training: bool
    ) -> tuple[Float[Tensor, "B"], Float[Tensor, "B"]]:
        """Return each row's summed answer loss and its number of answer tokens."""
        batch = collate([row for _, _, row in micro], self.pad, self.model.device)
        seats = [self.sitting(slot) for slot, _, _ in micro]
        embedding = torch.stack([job.embedding for job, _ in seats]).to(self.model.device)
        slots = torch.tensor([slot for slot, _, _ in micro], device=self.model.device)
        rows = RowContext(mode, embedding=embedding, slots=slots, complete=True)
        if training and self.config.dropout > 0:
            keys = [(job.user, state.step, at) for (job, state), (_, at, _) in zip(seats, micro, strict=True)]
            drawn = tuple(torch.Generator().manual_seed(seed_of(self.seed, "dropout", *key)) for key in keys)
            rows = replace(rows, generators=drawn, mask=batch.attention_mask.bool())
        logits = self.model.answer_logits(batch, rows)
        return answer_loss(logits, batch.labels)

    def _steps_per_pass(self, job: Job) -> int:
        return -(-len(job.items) // self.config.batch_size)

    def sitting(self, slot: int) -> tuple[Job, FitProgress]:
        """Return the job and progress of a slot, which must be occupied."""
        seat = self.seats[slot]
        assert seat is not None
        return seat

    def _tensors(self) -> dict[str, Tensor]:
        rows = {f"pending/{at}": outcome.row for at, outcome in enumerate(self.pending) if outcome.row is not None}
        if not any(self.seats):
            return rows
        return {"values": self.bank.values, "best": self.best, **self.optimizer.tensors(), **rows}

    def _facts(self) -> dict[str, Any]:
        return {
            "taken": self.taken,
            "steps": self.steps,
            "seats": [None if seat is None else vars(seat[1]) for seat in self.seats],
            "pending": [{"state": vars(outcome.state), "reason": outcome.reason} for outcome in self.pending],
        }

    def _resume(self, jobs: Jobs, checkpoint: Checkpoint) -> None:
        held = checkpoint.load()
        if held is None:
            return
        tensors, facts = held
        if any(facts["seats"]):
            self.bank.values.copy_(tensors["values"])
            self.best.copy_(tensors["best"])
            self.optimizer.restore(tensors)
        self.taken, self.steps = facts["taken"], facts["steps"]
        for slot, seat in enumerate(facts["seats"]):
            self.seats[slot] = None if seat is None else (jobs[seat["index"]], FitProgress(**seat))
        for at, told in enumerate(facts["pending"]):
            state = FitProgress(**told["state"])
            job, row = jobs[state.index], tensors.get(f"pending/{at}")
            self.pending.append(FitResult(job.user, job.embedding, len(job.items), state, row, told["reason"]))
