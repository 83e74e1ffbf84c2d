"""Stage 3a training: fits LoRA adapters of many users at once; each step trains one small batch of each user in a slot.

S users occupy the slots of one bank, each trained as if alone. A user's loss is the mean over that user's tokens, the
gradient is clipped by its own norm, and moments, step count and schedule are per user; batches depend on (seed, user)
only. When a user is finished, the slot goes to the next job. A user whose loss or gradient is not finite goes into
quarantine, and the step is repeated without that user.

Results are passed to `done` right after a checkpoint that includes them. After a kill at any moment, users whose
results were not passed on resume from the checkpoint, and the others are not trained again.

`recipes/stage3a_users.py` is the same as one flat loop.
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from proper.config import UsersConfig
from proper.console import Bar, progress
from proper.data.encoder import EncodedExample
from proper.layers.low_rank import pull_
from proper.models.personal import ProperModel
from proper.training.checkpoint import Checkpoint, seed_of
from proper.training.held_out import losses_at_scales, record_losses
from proper.training.jobs import Done, FitProgress, FitResult, Job, Jobs, refusal
from proper.training.memory import pending_rows
from proper.training.metrics_log import Log
from proper.training.microbatching import SlotRow, micro_batches, padded_tokens, row_losses
from proper.training.optim import RowAdamW, clip_row_, rate_factor

logger = logging.getLogger(__name__)

Bad = dict[int, str]
"""Slots whose users cannot be trained further, and the reasons."""

Observe = Callable[[int, Sequence[SlotRow]], None]
"""Function that is called with the number of steps done and the rows of each training micro-batch."""


class MultiUserTrainer:
    """Trains the users in the S slots of a bank.

    Attributes:
        bank: the adapters that are trained (S, P).
        best: each slot's values at its lowest held-out loss so far (S, P).
        slots: each slot's job and its progress; None for a free slot.
        results: results that `done` has not received yet.
        started: number of jobs that were given a slot, or quarantined before.
        steps: optimizer steps done.
    """

    def __init__(
        self,
        model: ProperModel,
        config: UsersConfig,
        rate: float,
        seed: int,
        slots: int,
        pad: int,
        observe: Observe = lambda steps, work: None,
    ) -> None:
        self.model, self.config, self.rate, self.seed, self.pad = model, config, rate, seed, pad
        self._observe = observe
        self.bank = model.add_bank(config, slots, trainable=True, dropout=config.dropout)
        self.optimizer = RowAdamW.of(self.bank.values, weight_decay=config.weight_decay)
        self.best = torch.zeros_like(self.bank.values)
        self.slots: list[tuple[Job, FitProgress] | None] = [None] * slots
        self.results: list[FitResult] = []
        self.started = self.steps = 0

    def run(
        self, jobs: Jobs, done: Done, checkpoint: Checkpoint | None, log: Log, title: str, bar: Bar = progress
    ) -> None:
        """Fit all jobs, resuming from the checkpoint, if any; `done` gets several results at a time."""
        if checkpoint is not None:
            self._resume(jobs, checkpoint)
        self._hand_over(done, again=True)
        started, limit, shown = time.perf_counter(), pending_rows(self.bank), 0
        with bar(title, len(jobs)) as advance:
            while self._fill_slots(jobs):
                metrics = self._step()
                if metrics is None:
                    continue
                self._pass_ended()
                advance(self._finished() - shown, share=self._share(len(jobs)))
                shown = self._finished()
                step = {"phase": title, "step": self.steps, "seconds": round(time.perf_counter() - started, 3)}
                log({"stage": "users", "seed": self.seed, **step, **metrics})
                if (checkpoint is not None and checkpoint.due()) or len(self.results) >= limit:
                    self._hand_over(done, checkpoint)
            advance(self._finished() - shown)
            if self.results:
                self._hand_over(done, checkpoint)

    def _finished(self) -> int:
        return self.started - sum(entry is not None for entry in self.slots)

    def _share(self, jobs: int) -> float:
        """Return the share of all steps that is done, as if every user took all of theirs."""
        occupied = filter(None, self.slots)
        begun = sum(state.step / (job.steps_per_pass(self.config.batch_size) * job.epochs) for job, state in occupied)
        return (self._finished() + begun) / jobs

    def _hand_over(self, done: Done, checkpoint: Checkpoint | None = None, again: bool = False) -> None:
        if checkpoint is not None:
            checkpoint.save(self._tensors(), self._metadata())
        if self.results:
            done(self.results, again)
            self.results = []

    def _fill_slots(self, jobs: Jobs) -> bool:
        """Assign free slots to the next jobs; return whether any slot is occupied."""
        while new := self._start_jobs(jobs):
            self._measure(new)
        return any(entry is not None for entry in self.slots)

    def _start_jobs(self, jobs: Jobs) -> list[int]:
        """Fill the free slots and return them; jobs that cannot be run at all go into quarantine."""
        longest = getattr(self.model.backbone.model.config.get_text_config(), "max_position_embeddings", None)
        new = []
        while self.started < len(jobs) and None in self.slots:
            job, state = jobs[self.started], FitProgress(self.started)
            self.started += 1
            reason = refusal(job, longest)
            if reason is not None:
                self._quarantine(job, state, reason)
                continue
            slot = self.slots.index(None)
            self._fill(slot, job)
            self.optimizer.reset(slot)
            self.best[slot] = self.bank.values[slot]
            self.slots[slot] = (job, state)
            new.append(slot)
        return new

    def _fill(self, slot: int, job: Job) -> None:
        self.bank.fresh(slot, torch.Generator().manual_seed(seed_of(self.seed, "adapter", job.user)))
        if job.start is not None:
            self.bank.values[slot] = job.start.to(self.bank.values)

    def _step(self) -> dict[str, Any] | None:
        """Take one optimizer step for all users in slots; if a user is quarantined, update nothing and return None."""
        occupied = {slot: entry for slot, entry in enumerate(self.slots) if entry is not None}
        chosen = {
            slot: job.batch(self.seed, state.step, self.config.batch_size) for slot, (job, state) in occupied.items()
        }
        losses, tokens, padded = self._backward(chosen)
        assert (gradients := self.bank.gradients) is not None
        if self.config.distance:
            for slot, (job, _) in occupied.items():
                pull_(self.bank, slot, job.anchor, self.config.distance)
        bad = {slot: "quarantined: the loss is not finite" for slot, loss in losses.items() if not math.isfinite(loss)}
        for slot in chosen:
            if not math.isfinite(clip_row_(gradients[slot], self.config.clip)):
                bad.setdefault(slot, "quarantined: the gradient is not finite")
        if bad:
            self._remove(bad)
            return None
        rates, each = [self._rate(slot) for slot in chosen], (gradients[slot] for slot in chosen)
        self.optimizer.step(self.bank.values, torch.tensor(list(chosen)), each, rates)
        self.steps += 1
        for slot, (_, state) in occupied.items():
            state.step += 1
            state.trained = losses[slot]
        loss = round(sum(losses.values()) / len(losses), 6)
        return {"loss": loss, "users": len(chosen), "tokens": tokens, "padded": padded}

    def _backward(self, chosen: dict[int, list[EncodedExample]]) -> tuple[dict[int, float], int, int]:
        """Fill the bank's gradients; return each slot's loss, and the number of tokens without and with padding."""
        assert self.bank.gradients is not None
        self.bank.gradients.zero_()
        answers = {slot: sum(r.answers for r in batch) for slot, batch in chosen.items()}
        work = [(slot, at, row) for slot, batch in chosen.items() for at, row in enumerate(batch)]
        jobs = {slot: self.job_in(slot)[0] for slot in chosen}
        losses = dict.fromkeys(chosen, 0.0)
        pieces = list(micro_batches(work, self.model.backbone.batch_tokens))
        for piece in pieces:
            self._observe(self.steps, piece)
            sums, _ = row_losses(self.model, jobs, piece, "fit", self.pad, self._dropout_generators(piece))
            shares = torch.tensor([answers[slot] for slot, _, _ in piece], dtype=sums.dtype, device=sums.device)
            torch.autograd.backward((sums / shares).sum())
            for (slot, _, _), value in zip(piece, sums.tolist(), strict=True):
                losses[slot] += value / answers[slot]
        return losses, sum(len(r.ids) for _, _, r in work), padded_tokens(pieces)

    def _quarantine(self, job: Job, state: FitProgress, reason: str) -> None:
        logger.warning(f"proper: user {job.user!r}: {reason} (step {state.step + 1}); the user stays on the group tier")
        self.results.append(FitResult(job.user, job.embedding, len(job.items), state, None, reason))

    def _remove(self, bad: Bad) -> None:
        for slot, reason in bad.items():
            self._quarantine(*self.job_in(slot), reason)
            self.slots[slot] = None

    def _rate(self, slot: int) -> float:
        """Return the learning rate of a slot's next step, by the schedule of its own job."""
        job, state = self.job_in(slot)
        steps = job.steps_per_pass(self.config.batch_size) * (job.horizon or job.epochs)
        return self.rate * rate_factor(state.step, steps, self.config.warmup, self.config.schedule)

    def _pass_ended(self) -> None:
        """Compute the held-out loss of users who have just ended a pass, and free the slots of finished users."""
        occupied = ((slot, *entry) for slot, entry in enumerate(self.slots) if entry is not None)
        ended = [slot for slot, job, state in occupied if state.step % job.steps_per_pass(self.config.batch_size) == 0]
        self._measure([slot for slot in ended if self._passes(slot) in self.job_in(slot)[0].measured_passes])
        for slot in ended:
            if self.slots[slot] is not None and self._is_finished(slot):
                self._finish(slot)

    def _is_finished(self, slot: int) -> bool:
        job, state = self.job_in(slot)
        stalled = bool(job.held_out) and state.stalled >= self.config.patience
        return stalled or self._passes(slot) >= job.epochs

    def _finish(self, slot: int) -> None:
        job, state = self.job_in(slot)
        if not job.held_out:
            state.best = self._passes(slot)
        row = (self.best if job.held_out else self.bank.values)[slot].cpu().clone()
        self.results.append(FitResult(job.user, job.embedding, len(job.items), state, row))
        self.slots[slot] = None

    def _measure(self, slots: list[int]) -> None:
        """Record the held-out loss of these slots at every scale, and keep the best weights so far."""
        jobs = {slot: self.job_in(slot)[0] for slot in slots if self.job_in(slot)[0].held_out}
        started = any(self.job_in(slot)[1].losses for slot in jobs)
        # Before training, a fresh adapter has B = 0, which changes nothing at any scale.
        scales = {scale for job in jobs.values() for scale in (job.scales if started else (job.reference,))}
        found = losses_at_scales(self.model, self.bank, jobs, scales, self.pad)
        bad: Bad = {}
        for slot, job in jobs.items():
            losses, state = {scale: by_slot[slot] for scale, by_slot in found.items()}, self.job_in(slot)[1]
            if not all(values.isfinite().all() for values in losses.values()):
                bad[slot] = "quarantined: the held-out loss is not finite"
                continue
            if record_losses(state, job, losses) <= min(state.losses):
                state.best = self._passes(slot)
                self.best[slot] = self.bank.values[slot] if started or job.reference else 0
        self._remove(bad)

    def _passes(self, slot: int) -> int:
        job, state = self.job_in(slot)
        return state.step // job.steps_per_pass(self.config.batch_size)

    def _dropout_generators(self, work: Sequence[SlotRow]) -> list[torch.Generator]:
        """Return each row's generator, which depends on the seed, the user, the step and the row only."""
        if self.config.dropout == 0:
            return []
        entries = [(*self.job_in(slot), at) for slot, at, _ in work]
        seeds = [seed_of(self.seed, "dropout", job.user, state.step, at) for job, state, at in entries]
        return [torch.Generator().manual_seed(seed) for seed in seeds]

    def job_in(self, slot: int) -> tuple[Job, FitProgress]:
        """Return the job and progress of a slot, which must be occupied."""
        entry = self.slots[slot]
        assert entry is not None
        return entry

    def _tensors(self) -> dict[str, Tensor]:
        rows = {f"pending/{at}": result.row for at, result in enumerate(self.results) if result.row is not None}
        if not any(self.slots):
            return rows
        return {"values": self.bank.values, "best": self.best, **self.optimizer.tensors(), **rows}

    def _metadata(self) -> dict[str, Any]:
        # Not called as in the code: a run that an earlier version began goes on from its checkpoint.
        return {
            "taken": self.started,
            "steps": self.steps,
            "seats": [None if entry is None else vars(entry[1]) for entry in self.slots],
            "pending": [{"state": vars(result.state), "reason": result.reason} for result in self.results],
        }

    def _resume(self, jobs: Jobs, checkpoint: Checkpoint) -> None:
        saved = checkpoint.load()
        if saved is None:
            return
        tensors, metadata = saved
        if any(metadata["seats"]):
            self.bank.values.copy_(tensors["values"])
            self.best.copy_(tensors["best"])
            self.optimizer.restore(tensors)
        self.started, self.steps = metadata["taken"], metadata["steps"]
        for slot, state in enumerate(metadata["seats"]):
            self.slots[slot] = None if state is None else (jobs[state["index"]], FitProgress(**state))
        for at, result in enumerate(metadata["pending"]):
            state = FitProgress(**result["state"])
            job, row = jobs[state.index], tensors.get(f"pending/{at}")
            self.results.append(FitResult(job.user, job.embedding, len(job.items), state, row, result["reason"]))
