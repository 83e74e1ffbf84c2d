"""Stage 3a that goes on from an adapter, with a penalty on the distance to it, against the plainest loop."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from torch import Tensor

from proper.config import UsersConfig
from proper.data.encoder import EncodedExample
from proper.layers.bank import AdapterBank
from proper.layers.batch_context import RowContext
from proper.layers.layout import Layout
from proper.models.personal import ProperModel
from proper.training.checkpoint import Checkpoint, seed_of
from proper.training.jobs import FitResult, Job
from proper.training.multi_user_trainer import MultiUserTrainer
from proper.training.optim import rate_factor
from tests.training.test_alone import MODELS

MODEL = MODELS[torch.float64]


def penalty(layout: Layout, row: Tensor, start: Tensor, scale: float) -> Tensor:
    """The definition, on whole matrices."""
    tensors, others = layout.unpack(row), layout.unpack(start)
    names = [name.removesuffix(".A") for name in tensors if name.endswith(".A")]
    moved = [tensors[f"{each}.B"] @ tensors[f"{each}.A"] - others[f"{each}.B"] @ others[f"{each}.A"] for each in names]
    return scale**2 * torch.stack([each.square().sum() for each in moved]).sum()


def oracle(
    model: ProperModel, job: Job, config: UsersConfig, rate: float, passes: int, dtype: torch.dtype = torch.float64
) -> Tensor:
    """Train row by row, with autograd through whole products and AdamW written out."""
    assert job.start is not None
    bank = AdapterBank(model.user_layout(config), 1, alpha=config.alpha, trainable=True, dtype=dtype)
    assert bank.gradients is not None
    model.use_bank(bank)
    row, first, second = job.start.clone(), torch.zeros_like(job.start), torch.zeros_like(job.start)
    per_pass = -(-len(job.items) // config.batch_size)
    for step in range(per_pass * passes):
        epoch, at = divmod(step, per_pass)
        draw = torch.Generator().manual_seed(seed_of(0, "order", job.user, epoch))
        order = torch.randperm(len(job.items), generator=draw).tolist()
        batch = [job.items[i] for i in order[at * config.batch_size : (at + 1) * config.batch_size]]
        bank.values[0] = row
        bank.gradients.zero_()
        answers = sum(item.answers for item in batch)
        for item in batch:
            wanted = torch.tensor(item.ids[item.start :])
            loss = torch.nn.functional.cross_entropy(logits_of(model, job, item), wanted, reduction="sum") / answers
            torch.autograd.backward(loss)
        own = row.clone().requires_grad_()
        (pulled,) = torch.autograd.grad(penalty(bank.layout, own, job.start, bank.scale), own)
        gradient = bank.gradients[0] + config.distance * pulled
        gradient = gradient * min(1.0, config.clip / float(gradient.norm()))
        lr = rate * rate_factor(step, per_pass * job.epochs, config.warmup, config.schedule)
        first, second = 0.9 * first + 0.1 * gradient, 0.999 * second + 0.001 * gradient**2
        moved = first / (1 - 0.9 ** (step + 1)) / ((second / (1 - 0.999 ** (step + 1))).sqrt() + 1e-8)
        row = row - lr * moved
    return row


def logits_of(model: ProperModel, job: Job, item: EncodedExample) -> Tensor:
    """Logits of the answer's tokens, (A, V), one row alone."""
    rows = RowContext("fit", embedding=job.embedding.unsqueeze(0), slots=torch.zeros(1, dtype=torch.long))
    with model.routing.use(rows):
        logits: Tensor = model.backbone.model(input_ids=torch.tensor([item.ids]), use_cache=False).logits
    return logits[0, item.start - 1 : -1]


@pytest.mark.parametrize("distance", [0.0, 0.5])
def test_going_on_from_an_adapter_is_what_the_slow_oracle_does(distance: float) -> None:
    config = UsersConfig(rank=2, batch_size=2, distance=distance)
    draw = torch.Generator().manual_seed(3)
    start = 0.1 * torch.randn(MODEL.user_layout(config).width, dtype=torch.float64, generator=draw)
    rows = torch.randint(0, 48, (5, 8), generator=draw).tolist()
    items = tuple(EncodedExample("ann", tuple(row), 5) for row in rows)
    job = Job("ann", torch.full((4,), 0.3, dtype=torch.float64), items, epochs=3, start=start, anchor=start)
    found: list[FitResult] = []

    def done(results: Sequence[FitResult], again: bool) -> None:
        found.extend(results)

    with tempfile.TemporaryDirectory() as folder:
        trainer = MultiUserTrainer(MODEL, config, 5e-3, 0, 2, pad=0)
        trainer.run([job], done, Checkpoint(Path(folder) / "checkpoint", 1e9), lambda facts: None, "fit")
    assert found[0].row is not None and not torch.equal(found[0].row, start)
    torch.testing.assert_close(found[0].row, oracle(MODEL, job, config, 5e-3, 3), rtol=1e-6, atol=1e-8)
