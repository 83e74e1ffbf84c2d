"""Speed of a backbone on this machine: seconds per token of training and of forward passes, from a few measured steps.

Each of stages 1 and 2 takes a step on one batch of the run's own rows, after a warm-up on the same batch, so that
padding and the fixed cost of a step are in it. Nothing is updated.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from accelerate import Accelerator
from torch import Tensor

from proper.config import Config
from proper.data.batching import Batch, collate
from proper.data.dataset import Dataset
from proper.data.encoder import EncodedExample
from proper.data.histories import SampledRows
from proper.data.stage_sample import stage_sample
from proper.methods.workload import Work
from proper.models.backbone import Backbone, configured_backbone
from proper.models.memory import give_back_memory
from proper.models.personal import ProperModel
from proper.training.groups import GroupsStage
from proper.training.population import in_training, wrap
from proper.training.trainer import TrainableStage, parts_of

SAMPLE = 256
"""Rows of which the batch with the median length is taken."""


@dataclass(frozen=True)
class Speed:
    """Seconds per trained token of stages 1 and 2 (stage 3 counts as stage 2), per forward token, per decoded step."""

    population: float
    groups: float
    forward: float
    decode: float

    def seconds(self, stage: str, work: Work) -> float:
        """Return the time of a stage, or of the evaluation, on this machine."""
        trained = self.population if stage == "population" else self.groups
        return work.tokens * trained + work.forward * self.forward + work.decoded * self.decode


def parameters_of(backbone: Backbone) -> int:
    """Return the number of parameters."""
    return sum(parameter.numel() for parameter in backbone.model.parameters())


def measure(config: Config, dataset: Dataset, backbone: Backbone | None = None) -> Speed:
    """Measure a few steps on the run's rows; takes seconds.

    The given backbone is left with the modules of stage 2 and must not be used afterwards.

    Raises:
        DataError: a stage has no rows to train on.
    """
    backbone = backbone or configured_backbone(config)
    seed = config.evaluation.seeds[0]
    first = config.population
    accelerator = Accelerator(cpu=backbone.device.type == "cpu", mixed_precision="no")
    with torch.random.fork_rng():
        sample = stage_sample(dataset, "population", config, seed)
        rows = _typical(sample, config, backbone, 1)
        wrapped = wrap(backbone, first, seed)
        with in_training(backbone, wrapped, first) as stage:
            population = _training(stage, rows, backbone)
        wrapped.unload()
        forward = _forward(backbone, rows)
        decode = _decode(backbone, min(config.compute.batch_size, max(1, sum(1 for _ in dataset.queries()))))
        rows = _typical(stage_sample(dataset, "groups", config, seed), config, backbone, 2)
        groups = _groups(config, rows, backbone, accelerator)
    give_back_memory()
    return Speed(population, groups, forward, decode)


def _typical(sample: SampledRows, config: Config, backbone: Backbone, stage: int) -> list[EncodedExample]:
    """Return the batch in the middle of the first rows by length."""
    settings = config.population if stage == 1 else config.groups
    encoder = backbone.encoder()
    rows = [row for row, _ in zip(sample.rows(0), range(SAMPLE), strict=False)]
    rows.sort(key=lambda row: row.tokens)
    size = config.privacy.rows_per_user if config.privacy.on else settings.batch_size
    at = max(0, len(rows) // 2 - size // 2)
    return [encoder.encode(row) for row in rows[at : at + size]]


def _groups(config: Config, rows: list[EncodedExample], backbone: Backbone, accelerator: Accelerator) -> float:
    model = ProperModel(backbone)
    with TemporaryDirectory() as folder, model.caching(Path(folder), config.compute.cache_mb):
        model.add_experts(config.groups, 0)
        for parameter in model.group_parameters().values():
            parameter.requires_grad_(True)
        model.train(True)
        users = sorted({row.user for row in rows})
        stage = GroupsStage(model, config.groups, users, 0, accelerator, backbone.batch_tokens)
        return _training(stage, rows, backbone)


def _training(stage: TrainableStage, rows: list[EncodedExample], backbone: Backbone) -> float:
    """Return the seconds per token of a step's forward and backward passes."""
    parts = parts_of(rows, backbone.batch_tokens) if stage.in_parts else [rows]
    batches = [collate(part, backbone.pad_id, backbone.device) for part in parts]

    def step() -> None:
        for batch in batches:
            loss = stage.loss(batch, 0.5)
            torch.autograd.backward(loss.objective(loss.tokens))

    seconds = _timed(step, backbone.device)
    for parameter in stage.parameters().values():
        parameter.grad = None
    return seconds / sum(batch.tokens for batch in batches)


@torch.no_grad()
def _forward(backbone: Backbone, rows: Sequence[EncodedExample]) -> float:
    batch = collate(rows[: max(1, backbone.batch_tokens // len(rows[-1].ids))], backbone.pad_id, backbone.device)
    return _timed(lambda: _run(backbone, batch), backbone.device) / batch.tokens


@torch.no_grad()
def _decode(backbone: Backbone, rows: int) -> float:
    """Return the seconds of a pass over one token of each of these rows."""
    ids = torch.zeros(rows, 1, dtype=torch.long, device=backbone.device)
    return _timed(lambda: backbone.model(input_ids=ids, use_cache=False), backbone.device)


def _run(backbone: Backbone, batch: Batch) -> Tensor:
    last = torch.tensor([batch.input_ids.shape[1] - 1], device=backbone.device)
    given = {"input_ids": batch.input_ids, "attention_mask": batch.attention_mask, "position_ids": batch.position_ids}
    logits: Tensor = backbone.model(**given, logits_to_keep=last, use_cache=False).logits
    return logits


def _timed(work: Callable[[], object], device: torch.device) -> float:
    """Return the seconds of the second call; the first prepares kernels and memory."""
    for _ in range(2):
        started = time.perf_counter()
        work()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
    return time.perf_counter() - started
