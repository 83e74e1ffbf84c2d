"""End-to-end ablation: train experts, routers, user embeddings and user adapters jointly on the backbone, in one stage.

It trains on the same rows as the three stages, each equally often, in one seeded order, so that both use the same
number of tokens. Of stage 3 only the final fit counts, not the trial fits that decide which users gain. An adapter then
takes a step in every batch with a row of its user, which may be more or fewer than in stage 3; the variant
`end-to-end-steps` trains for as many passes as give an adapter the optimizer steps of stage 3, as a mean over users.
Runs in one process.
"""

from __future__ import annotations

import itertools
import math
import random
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from statistics import fmean

import torch
from torch import Tensor, nn

from proper.adapters.quantization import encode
from proper.adapters.store import AdapterStore, UserRecord
from proper.data.batching import Batch
from proper.data.histories import Histories, SampledRows, TextExample, User
from proper.data.stage_sample import stage_sample
from proper.evaluation.runner import MethodRun
from proper.files import hash_file, write_json
from proper.inference.loading import serve_users
from proper.layers.bank import AdapterBank
from proper.methods.spec import TrainedRun, TrainingWork
from proper.methods.stage_methods import answer_with
from proper.models.backbone import configured_backbone
from proper.models.checkpoints import save_tensors
from proper.models.personal import ProperModel
from proper.run_folder import RunFolder, Stage, Tier
from proper.training.checkpoint import seed_of
from proper.training.groups import GroupsStage, train_stage
from proper.training.jobs import full_passes
from proper.training.metrics_log import Log
from proper.training.optim import RowAdamW, clip_rows, resolve_rate
from proper.training.plans import stage_plan
from proper.training.stages import join_processes
from proper.training.trainer import LossSum

_SCALINGS = 3
"""Rounds of scaling the passes: steps do not grow quite in proportion, since a batch may hold two rows of a user."""


@dataclass(frozen=True)
class Newest:
    """The newest rows of some users, as in one pass of stage 3."""

    dataset: Histories
    users: Sequence[str]
    max_items: int | None
    max_length: int
    seed: int

    @property
    def size(self) -> int:
        """Number of rows in one pass."""
        return sum(len(self.dataset.history(user, self.max_items)) for user in self.users)

    @property
    def tokens(self) -> int:
        """Number of tokens in one pass; a row counts at most the model's maximum length."""
        histories = (self.dataset.history(user, self.max_items) for user in self.users)
        return sum(min(row.tokens, self.max_length) for history in histories for row in history)

    def rows(self, epoch: int) -> Iterator[TextExample]:
        """Yield every row once, user by user, users in seeded order."""
        shuffle = random.Random(seed_of(self.seed, "newest", epoch))
        for user in shuffle.sample(self.users, len(self.users)):
            history = self.dataset.history(user, self.max_items)
            yield from shuffle.sample(history, len(history))


@dataclass(frozen=True)
class Together:
    """Several samples, each with its own number of passes, interleaved into one stream."""

    parts: tuple[tuple[SampledRows, float], ...]
    seed: int

    @property
    def size(self) -> int:
        """Total number of rows."""
        return sum(self._sizes())

    @property
    def tokens(self) -> int:
        """Total number of tokens."""
        return sum(round(rows.tokens * passes) for rows, passes in self.parts)

    def rows(self, epoch: int) -> Iterator[TextExample]:
        """Yield the rows of every pass; the next part is drawn with probability proportional to its remaining rows."""
        shuffle = random.Random(seed_of(self.seed, "together", epoch))
        left = self._sizes()
        streams = [_passes(rows) for rows, _ in self.parts]
        while any(left):
            part = shuffle.choices(range(len(left)), weights=left)[0]
            left[part] -= 1
            yield next(streams[part])

    def _sizes(self) -> list[int]:
        return [round(rows.size * passes) for rows, passes in self.parts]


def _passes(rows: SampledRows) -> Iterator[TextExample]:
    epoch = 0
    while True:
        yield from rows.rows(epoch)
        epoch += 1


def adapter_steps(sample: SampledRows, users: Sequence[str], batch: int) -> float:
    """Return in how many batches of so many rows a user has a row, as a mean over the users."""
    targets, found, rows = set(users), 0, sample.rows(0)
    while some := [row.user for row in itertools.islice(rows, batch)]:
        found += len(targets.intersection(some))
    return found / len(users)


def with_steps(together: Together, users: Sequence[str], batch: int, wanted: float) -> Together:
    """Return the same rows with the number of passes that gives an adapter the wanted steps, as a mean over users."""
    scaled = together
    for _ in range(_SCALINGS):
        factor = wanted / max(adapter_steps(scaled, users, batch), 1 / len(users))
        scaled = replace(scaled, parts=tuple((rows, passes * factor) for rows, passes in scaled.parts))
    return scaled


class JointStage:
    """Training stage that combines stage 2 with user adapters.

    Attributes:
        bank: adapter bank with one slot for every target user.
    """

    name = "end-to-end"

    def __init__(self, groups: GroupsStage, bank: AdapterBank, slots: dict[str, int], rate: float, clip: float) -> None:
        self.groups, self.bank, self.slots, self.rate, self.clip = groups, bank, slots, rate, clip
        self.optimizer = RowAdamW.of(bank.values)
        self._present: set[int] = set()

    @property
    def in_parts(self) -> bool:
        """Whether a batch may be computed in parts, as in stage 2."""
        return self.groups.in_parts

    def parameters(self) -> dict[str, nn.Parameter]:
        """Return experts and routers."""
        return self.groups.parameters()

    def loss(self, batch: Batch, progress: float) -> LossSum:
        """Return a batch's answer loss, each row with its user's mixture and adapter, plus the weighted constraint."""
        own = [self.slots.get(user, -1) for user in batch.users]
        self._present |= set(own) - {-1}
        slots = torch.tensor(own, device=batch.input_ids.device)
        rows = replace(self.groups.rows(batch), mode="fit", slots=slots)
        with self.groups.saving_memory(batch):
            total, tokens = self.groups.model.answer_losses(batch, rows)
        return LossSum(total.sum(), tokens.sum(), self.groups.penalty(progress))

    def after_backward(self, rate_factor: float) -> None:
        """Update embeddings and adapters of the users in this batch."""
        self.groups.after_backward(rate_factor)
        assert self.bank.gradients is not None
        if self._present:
            rows = torch.tensor(sorted(self._present), device=self.bank.values.device)
            gradients = clip_rows(self.bank.gradients[rows], self.clip)
            self.optimizer.step(self.bank.values, rows, gradients, self.rate * rate_factor)
        self.bank.gradients.zero_()
        self._present.clear()

    def state(self) -> dict[str, Tensor]:
        """Return embeddings, adapters and their optimizer moments."""
        return {**self.groups.state(), "adapters": self.bank.values, **self.optimizer.tensors("adapters/")}

    def restore(self, tensors: dict[str, Tensor]) -> None:
        """Restore embeddings, adapters and their optimizer moments."""
        self.groups.restore(tensors)
        self.bank.values.copy_(tensors["adapters"])
        self.optimizer.restore(tensors, "adapters/")


def train_end_to_end(work: TrainingWork) -> None:
    """Train experts and user adapters jointly on the backbone, on as many tokens as the three stages."""
    JointTraining(work.run, work.log).train()


def train_equal_steps(work: TrainingWork) -> None:
    """Train as `train_end_to_end`, for as many optimizer steps per adapter as stage 3."""
    JointTraining(work.run, work.log, equal_steps=True).train()


def answer_end_to_end(run: TrainedRun) -> MethodRun:
    """Answer with the experts and adapters that `train_end_to_end` trained."""
    model = ProperModel(configured_backbone(run.config))
    return answer_with(run, model, serve_users(run.folder, run.config, model))


@dataclass(frozen=True)
class JointTraining:
    """End-to-end training into `groups` and `users` of a folder that has no population.

    Attributes:
        run: the folder, its config, data and seed.
        equal_steps: whether an adapter gets the optimizer steps of stage 3, as a mean over users.
    """

    run: TrainedRun
    log: Log
    equal_steps: bool = False

    def train(self) -> None:
        """Train to the end, resuming from the checkpoint; do nothing if training is complete."""
        folder = RunFolder(self.run.folder)
        if folder.is_trained(Stage.USERS):
            return
        config, started = self.run.config, time.perf_counter()
        accelerator = join_processes(config)
        backbone = configured_backbone(config, accelerator.device)
        model = ProperModel(backbone)
        model.add_experts(config.groups, seed_of(self.run.seed, "experts"))
        users = [user.id for user in self.run.dataset.users() if user.history > 0]
        slots = {user.id: at for at, user in enumerate(self._targets())}
        bank = self._bank(model, slots)
        rate = resolve_rate(config.users.learning_rate, "users", backbone.hidden_size)
        groups = GroupsStage(model, config.groups, users, self.run.seed, accelerator, backbone.batch_tokens)
        stage = JointStage(groups, bank, slots, rate, config.users.clip)
        sample = self.rows()
        # One pass, because `sample` already contains every row as often as the three stages train on it.
        once = config.model_copy(update={"groups": config.groups.model_copy(update={"epochs": 1.0})})
        encoder = backbone.encoder()
        plan = stage_plan("groups", once, sample, backbone, encoder, self.run.folder, self.run.seed, self.log)
        with model.caching(self.run.folder, config.compute.cache_mb):
            train_stage(stage, model, config.groups, plan, accelerator)
        self._save(model, users, groups.embeddings, slots, bank)
        metadata = {"rows": sample.size, "tokens": sample.tokens, "seed": self.run.seed, "backbone": backbone.digest}
        metadata |= {"users": len(slots), "seconds": round(time.perf_counter() - started, 3)}
        for name in (Stage.GROUPS, Stage.USERS):
            write_json(folder.marker(name), metadata)
        plan.checkpoint.remove()

    def rows(self) -> Together:
        """Return the training rows of the three stages: the same samples, with as many passes or adapter steps."""
        population, groups, users = self.run.config.population, self.run.config.groups, self.run.config.users
        own = [user.id for user in self._targets()]
        newest = Newest(self.run.dataset, own, users.max_items, self.run.config.compute.max_length, self.run.seed)
        lengths = [len(self.run.dataset.history(user, users.max_items)) for user in own]
        passes = sum(full_passes(users, items) * items for items in lengths) / max(1, sum(lengths))
        together = Together(
            (
                (stage_sample(self.run.dataset, "population", self.run.config, self.run.seed), population.epochs),
                (stage_sample(self.run.dataset, "groups", self.run.config, self.run.seed), groups.epochs),
                (newest, passes),
            ),
            self.run.seed,
        )
        if not self.equal_steps:
            return together
        wanted = fmean(full_passes(users, items) * math.ceil(items / users.batch_size) for items in lengths)
        return with_steps(together, own, groups.batch_size * groups.gradient_accumulation, wanted)

    def _targets(self) -> list[User]:
        return [user for user in self.run.dataset.users("target") if user.history > 0]

    def _bank(self, model: ProperModel, slots: dict[str, int]) -> AdapterBank:
        bank = model.add_bank(self.run.config.users, len(slots), trainable=True)
        for user, slot in slots.items():
            bank.fresh(slot, torch.Generator().manual_seed(seed_of(self.run.seed, "adapter", user)))
        return bank

    def _save(
        self, model: ProperModel, users: Sequence[str], embeddings: Tensor, slots: dict[str, int], bank: AdapterBank
    ) -> None:
        folder = RunFolder(self.run.folder)
        tensors = {**model.group_parameters(), "mean_embedding": embeddings.mean(0)}
        save_tensors(folder.experts, tensors, {"modules": list(model.layers)})
        store = AdapterStore(folder.users.path)
        groups = hash_file(folder.experts)
        store.bind({"backbone": model.backbone.digest, "groups": groups, **self.run.config.users.adapter_shape})
        for at, user in enumerate(users):
            adapter = None
            if user in slots:
                adapter = encode(bank.layout.unpack(bank.values[slots[user]]), self.run.config.users.storage)
            store.put([UserRecord(user, Tier.USERS if adapter else Tier.GROUPS, embeddings[at], adapter)])
        store.close()
