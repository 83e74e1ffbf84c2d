"""`proper bench users`: adapters trained per hour, against other implementations of per-user training.

    oppu      user by user: PEFT's get_peft_model and transformers' Trainer, as in OPPU
    one_slot  this package's multi-user trainer with one slot
    mixed     this package's multi-user trainer
    ceiling   one LoRA of the same shape shared by all users, a plain loop over the same batches as `mixed`

All sides train the same items in bf16, batch 4, 2 epochs, and include each user's set-up. The first two train user by
user, so a subset of the users suffices to measure their rate. Each side also has a form with frozen experts, except
OPPU, which has none. The floor is the time of the matrix products alone at the speed of the largest of them.
"""

from __future__ import annotations

import logging
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from proper.benchmarks.measure import TimedSide, interleaved, machine
from proper.benchmarks.training_setup import (
    BACKBONE,
    DTYPE,
    backbone,
    make_jobs,
    personal_model,
    share_lora,
    synthetic_users,
    train_one_by_one,
)
from proper.config import GroupsConfig, UsersConfig
from proper.data.batching import collate
from proper.data.encoder import EncodedExample, Encoder
from proper.errors import ProperError
from proper.layers.batch_context import RowContext
from proper.models.backbone import pick_device
from proper.models.personal import answer_loss
from proper.training.checkpoint import Checkpoint
from proper.training.jobs import FitResult, Job
from proper.training.memory import auto_slots, device_memory, footprint
from proper.training.microbatching import Work
from proper.training.multi_user_trainer import MultiUserTrainer

logger = logging.getLogger(__name__)

RATE = 1e-3
MAX_LENGTH = 256


@dataclass(frozen=True)
class UsersBenchSize:
    """Benchmark size.

    Attributes:
        alone: users of the sides that train user by user.
    """

    users: int = 64
    items: int = 20
    alone: int = 16
    repeats: int = 5


QUICK = UsersBenchSize(users=32, alone=4, repeats=3)

Step = list[list[Work]]
"""The rows of one step, as micro-batches."""


def run(size: UsersBenchSize, device: str) -> dict[str, Any]:
    """Return {"setting", "figures", ...} of the benchmark.

    Args:
        size: benchmark size.
        device: "cpu", "cuda" or "auto".
    """
    place = pick_device(device)
    config = UsersConfig(batch_size=4, epochs=2, clip=1.0)
    plain = _Bench(size, config, None, place)
    grouped = _Bench(size, config, GroupsConfig(), place)
    sides: dict[str, Callable[[int], object]] = {
        "oppu": lambda _: train_one_by_one(plain.bare.model, plain.alone, config, RATE, plain.pad),
        "one_slot": lambda _: plain.fit(plain.alone, 1),
        "mixed": lambda _: plain.fit(plain.jobs, plain.slots),
        "ceiling": lambda _: plain.shared(),
        "one_slot_experts": lambda _: grouped.fit(grouped.alone, 1),
        "mixed_experts": lambda _: grouped.fit(grouped.jobs, grouped.slots),
        "ceiling_experts": lambda _: grouped.shared(),
    }
    logger.info(f"users: {size.users} users x {size.items} items, {size.repeats} repeats of {len(sides)} sides")
    _reset_peak(place)
    plain.fit(plain.jobs, plain.slots)
    peak = _peak(place)
    seconds = interleaved({name: TimedSide(work) for name, work in sides.items()}, size.repeats, logger.info)
    users = {name: size.alone if name.startswith(("oppu", "one_slot")) else size.users for name in sides}
    hourly = {name: 3600 * users[name] / statistics.median(times) for name, times in seconds.items()}
    return {
        "setting": _setting(size, plain, place),
        "figures": {**_ratios(hourly), "padding": plain.padding, "peak_memory_bytes": peak},
        "users_per_hour": {name: round(value, 1) for name, value in hourly.items()},
        "seconds": {name: [round(value, 3) for value in times] for name, times in seconds.items()},
        "floor": _floor(plain, hourly["mixed"]),
    }


def _ratios(hourly: dict[str, float]) -> dict[str, float]:
    """Return the speed ratios of `mixed` to the other sides, without and with experts."""
    found = {}
    for form in ("", "_experts"):
        for other in ("oppu", "one_slot", "ceiling"):
            base = hourly[other if other == "oppu" else other + form]
            found[f"mixed_over_{other}{form}"] = round(hourly[f"mixed{form}"] / base, 3)
    return found


class _Bench:
    """Models and jobs of one form of the benchmark, with or without experts."""

    def __init__(
        self, size: UsersBenchSize, config: UsersConfig, groups: GroupsConfig | None, device: torch.device
    ) -> None:
        self.config, self.groups, self.device = config, groups, device
        self.model = personal_model(device, groups)
        self.bare = backbone(device) if groups is None else self.model.backbone
        self.pad = self.bare.pad_id
        encoder = Encoder(self.bare.tokenizer, MAX_LENGTH)
        width = self.model.embedding_size
        self.jobs = make_jobs(synthetic_users(encoder, size.users, size.items), int(config.epochs), width)
        self.alone = self.jobs[: size.alone]
        parts = footprint(self.model, config, MAX_LENGTH)
        self.slots = min(size.users, auto_slots(parts, device_memory(device), device.type))
        self.stream = self._record()
        # The ceiling's LoRA wraps the same layers; it is removed while users are trained.
        self.ceiling = personal_model(device, groups)
        self.parameters = share_lora(self.ceiling.backbone.model, config.rank, config.alpha)
        for layer in self.ceiling.layers.values():
            layer.bank = None

    @property
    def padding(self) -> float:
        """Return the share of padding among the processed tokens."""
        rows = [piece for step in self.stream for piece in step]
        padded = sum(len(piece) * max(len(row.ids) for _, _, row in piece) for piece in rows)
        return round(1 - self.tokens / padded, 4)

    @property
    def tokens(self) -> int:
        """Return the number of processed tokens without padding."""
        return sum(len(row.ids) for step in self.stream for piece in step for _, _, row in piece)

    def _record(self) -> list[Step]:
        """Return the micro-batches of every step, by training all users once."""
        stream: list[Step] = []

        def observe(steps: int, work: Sequence[Work]) -> None:
            if len(stream) == steps:
                stream.append([])
            stream[-1].append(list(work))

        trainer = MultiUserTrainer(self.model, self.config, RATE, 0, self.slots, self.pad, observe)
        self._run(trainer, self.jobs)
        return stream

    def fit(self, jobs: Sequence[Job], slots: int) -> None:
        """Train these users' adapters."""
        self._run(MultiUserTrainer(self.model, self.config, RATE, 0, slots, self.pad), jobs)

    def _run(self, engine: MultiUserTrainer, jobs: Sequence[Job]) -> None:
        kept: list[Tensor] = []

        def done(outcomes: Sequence[FitResult], again: bool) -> None:
            kept.extend(outcome.row.to(DTYPE) for outcome in outcomes if outcome.row is not None)

        with tempfile.TemporaryDirectory(prefix="proper-bench-") as folder:
            engine.run(jobs, done, Checkpoint(Path(folder) / "engine", 1e9), lambda _: None, "users")
        if len(kept) != len(jobs):
            raise ProperError(f"bench users: {len(jobs) - len(kept)} users could not be trained")

    def shared(self) -> None:
        """Train one LoRA shared by all users on the same batches."""
        optimizer = torch.optim.AdamW(self.parameters, lr=RATE, weight_decay=0.0)
        for step in self.stream:
            optimizer.zero_grad()
            answers = sum(len(row.ids) - row.start for piece in step for _, _, row in piece)
            for piece in step:
                torch.autograd.backward(self._loss([row for _, _, row in piece]) / answers)
            torch.nn.utils.clip_grad_norm_(self.parameters, self.config.clip)
            optimizer.step()

    def _loss(self, rows: Sequence[EncodedExample]) -> Tensor:
        batch = collate(rows, self.pad, self.device)
        context = RowContext("off")
        if self.groups is not None:
            context = RowContext(
                "groups", embedding=torch.zeros(len(rows), self.ceiling.embedding_size, device=self.device)
            )
        total, _ = answer_loss(self.ceiling.answer_logits(batch, context), batch.labels)
        return total.sum()


def _setting(size: UsersBenchSize, bench: _Bench, device: torch.device) -> dict[str, Any]:
    tokens = [len(row.ids) for job in bench.jobs for row in job.items]
    return {
        "backbone": BACKBONE,
        "device": device.type,
        "machine": machine(device),
        "dtype": "bf16",
        "compile": False,
        "users": size.users,
        "users_one_by_one": size.alone,
        "items": size.items,
        "tokens_per_item": round(statistics.mean(tokens), 1),
        "batch_size": bench.config.batch_size,
        "epochs": bench.config.epochs,
        "rank": bench.config.rank,
        "slots": bench.slots,
        "repeats": size.repeats,
        "torch": torch.__version__,
    }


def _floor(bench: _Bench, hourly: float) -> dict[str, float]:
    """Return operations and bytes per user, and the share of `mixed`'s time that the products alone would take.

    Forward and backward pass of a frozen layer take 2 products of 2 operations per weight and token; a LoRA takes 3.
    """
    model = bench.bare.model
    weights = sum(p.numel() for name, p in model.named_parameters() if p.dim() == 2 and ".layers." in f".{name}")
    head = model.config.get_text_config().vocab_size * bench.bare.hidden_size
    rows = [row for step in bench.stream for piece in step for _, _, row in piece]
    answers = sum(len(row.ids) - row.start for row in rows)
    adapter = bench.model.user_layout(bench.config).width
    operations = 4 * (weights * bench.tokens + head * answers) + 6 * adapter * bench.tokens
    users, speed = len(bench.jobs), _speed(bench)
    # Per optimizer step of a user, gradients, values and both moments are read, and all but the gradients are written.
    steps = sum(len({slot for piece in step for slot, _, _ in piece}) for step in bench.stream)
    return {
        "operations_per_user": round(operations / users),
        "optimizer_bytes_per_user": round(7 * 4 * adapter * steps / users),
        "operations_per_second": round(speed),
        "share_of_mixed": round(operations / users / speed / (3600 / hourly), 3),
    }


def _speed(bench: _Bench, tokens: int = 1024) -> float:
    """Return operations per second of the FFN's matrix product at `tokens` tokens, median of 20."""
    weight = next(p for name, p in bench.bare.model.named_parameters() if "gate_proj" in name or "up_proj" in name)
    x = torch.randn(tokens, weight.shape[1], dtype=weight.dtype, device=weight.device)
    times = []
    for _ in range(20):
        started = time.perf_counter()
        torch.nn.functional.linear(x, weight)
        if weight.device.type == "cuda":
            torch.cuda.synchronize()
        times.append(time.perf_counter() - started)
    return 2 * tokens * weight.numel() / statistics.median(times)


def _reset_peak(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    elif Path("/proc/self/clear_refs").exists():
        Path("/proc/self/clear_refs").write_text("5")


def _peak(device: torch.device) -> int:
    """Return the peak memory in bytes since `_reset_peak`: of the GPU's allocator, or of the whole process."""
    if device.type == "cuda":
        return int(torch.cuda.max_memory_allocated(device))
    status = Path("/proc/self/status")
    lines = status.read_text().splitlines() if status.exists() else []
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM")), 0)
