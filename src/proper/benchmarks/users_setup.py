"""Models, jobs and sides of `proper bench users`: the multi-user trainer, and one LoRA for all users as its ceiling."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from proper.benchmarks.backbones import BenchBackbone
from proper.benchmarks.training_setup import DTYPE, make_jobs, personal_model, share_lora, synthetic_users
from proper.config import ComputeConfig, GroupsConfig, LastLayers, UsersConfig
from proper.data.batching import collate
from proper.data.encoder import EncodedExample, Encoder
from proper.errors import ProperError
from proper.layers.batch_context import RowContext
from proper.models.memory import device_memory
from proper.models.personal import ProperModel
from proper.training.checkpoint import Checkpoint
from proper.training.jobs import FitResult, Job
from proper.training.memory import auto_slots, footprint
from proper.training.microbatching import SlotRow
from proper.training.multi_user_trainer import MultiUserTrainer

RATE = 1e-3
MAX_LENGTH = 256

Step = list[list[SlotRow]]
"""The rows of one step, as micro-batches."""


@dataclass(frozen=True)
class UsersBenchSize:
    """Benchmark size.

    Attributes:
        alone: users of the sides that train user by user.
        backbone: the backbone of all sides.
        layers: adapted layers of `one_slot` and `mixed`, then those of further sides.
    """

    users: int = 64
    items: int = 20
    alone: int = 16
    repeats: int = 5
    backbone: BenchBackbone = BenchBackbone()
    layers: tuple[LastLayers, ...] = ("all",)


class UsersBench:
    """Models and jobs of one form of the benchmark, with or without experts.

    Attributes:
        models: a model for each of the size's `layers`.
    """

    def __init__(self, size: UsersBenchSize, config: UsersConfig, device: torch.device, *, experts: bool) -> None:
        self.config, self.experts, self.device = config, experts, device
        self.models: dict[LastLayers, ProperModel] = {}
        for layers in size.layers:
            self.models[layers] = personal_model(
                size.backbone.load(DTYPE, device), GroupsConfig(layers=layers), experts=experts
            )
        self.model = self.models[size.layers[0]]
        self._warm, self._open = set[LastLayers](), ExitStack()
        self.bare = self.model.backbone if experts else size.backbone.load(DTYPE, device)
        self.pad = self.bare.pad_id
        encoder = Encoder(self.bare.tokenizer, MAX_LENGTH, rows=self.bare.embeddings)
        width = self.model.embedding_size
        self.jobs = make_jobs(synthetic_users(encoder, size.users, size.items), int(config.epochs), width)
        self.alone = self.jobs[: size.alone]
        parts = footprint(self.model, config, MAX_LENGTH)
        self.slots = min(size.users, auto_slots(parts, device_memory(device), device.type))
        self.stream = self._record()
        # The ceiling's LoRA wraps the same kind of layers, all of them, and its passes are whole ones.
        self.ceiling = personal_model(size.backbone.load(DTYPE, device), GroupsConfig(), experts=experts)
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

        def observe(steps: int, work: Sequence[SlotRow]) -> None:
            if len(stream) == steps:
                stream.append([])
            stream[-1].append(list(work))

        trainer = MultiUserTrainer(self.model, self.config, RATE, 0, self.slots, self.pad, observe)
        self._run(trainer, self.jobs)
        return stream

    def fit(self, jobs: Sequence[Job], slots: int, layers: LastLayers | None = None) -> None:
        """Train these users' adapters in these layers (those of `mixed` if None), with an empty cache at first."""
        model = self.model if layers is None else self.models[layers]
        with (
            tempfile.TemporaryDirectory(prefix="proper-bench-") as folder,
            model.caching(Path(folder), ComputeConfig().cache_mb),
        ):
            self._run(MultiUserTrainer(model, self.config, RATE, 0, slots, self.pad), jobs)

    def fit_warm(self, layers: LastLayers) -> None:
        """Train all users' adapters in these layers, with the cache that earlier calls have filled."""
        model = self.models[layers]
        if layers not in self._warm:
            self._warm.add(layers)
            folder = self._open.enter_context(tempfile.TemporaryDirectory(prefix="proper-bench-"))
            self._open.enter_context(model.caching(Path(folder), ComputeConfig().cache_mb))
        self._run(MultiUserTrainer(model, self.config, RATE, 0, self.slots, self.pad), self.jobs)

    def close(self) -> None:
        """Close the caches."""
        self._open.close()

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
            answers = sum(row.answers for piece in step for _, _, row in piece)
            for piece in step:
                torch.autograd.backward(self._loss([row for _, _, row in piece]) / answers)
            torch.nn.utils.clip_grad_norm_(self.parameters, self.config.clip)
            optimizer.step()

    def _loss(self, rows: Sequence[EncodedExample]) -> Tensor:
        batch = collate(rows, self.pad, self.device)
        context = RowContext("off")
        if self.experts:
            context = RowContext(
                "groups", embedding=torch.zeros(len(rows), self.ceiling.embedding_size, device=self.device)
            )
        total, _ = self.ceiling.answer_losses(batch, context)
        return total.sum()
