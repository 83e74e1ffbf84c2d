"""The penalty on the distance to the start: what it is, its gradient, and what it does to a training."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from proper.config import UsersConfig
from proper.data.encoder import EncodedExample
from proper.layers.bank import AdapterBank, Layout
from proper.layers.batch_context import RowContext
from proper.models.personal import ProperModel
from proper.training.checkpoint import Checkpoint, seed_of
from proper.training.distance import pull_back, squared_distance
from proper.training.jobs import FitResult, Job
from proper.training.multi_user_trainer import MultiUserTrainer
from proper.training.optim import factor
from tests.training.test_alone import MODELS

SHAPES = {"h.0.up": (5, 7), "h.1.up": (5, 7), "h.0.down": (7, 5), "h.1.down": (7, 5)}
MODEL = MODELS[torch.float64]


def products(layout: Layout, row: Tensor) -> list[Tensor]:
    """B A of every module, formed in full."""
    tensors = layout.unpack(row)
    names = [name.removesuffix(".A") for name in tensors if name.endswith(".A")]
    return [tensors[f"{name}.B"] @ tensors[f"{name}.A"] for name in names]


def penalty(layout: Layout, row: Tensor, start: Tensor, weight: float) -> Tensor:
    """The definition, on whole matrices."""
    pairs = list(zip(products(layout, row), products(layout, start), strict=True))
    moved = torch.stack([(now - then).square().sum() for now, then in pairs]).sum()
    return weight * moved / torch.stack([then.square().sum() for _, then in pairs]).sum()


@given(seed=st.integers(0, 2**31), rank=st.integers(1, 4), weight=st.floats(0.01, 10))
@settings(max_examples=40)
def test_penalty_and_gradient_are_those_of_the_products(seed: int, rank: int, weight: float) -> None:
    bank = AdapterBank(Layout.of(SHAPES, rank), 3, alpha=8.0, trainable=True, dtype=torch.float64)
    assert bank.gradients is not None
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        bank.values.normal_()
        start = torch.randn(bank.layout.width, dtype=torch.float64)
        bank.gradients.normal_()
    before = bank.gradients.clone()
    row = bank.values[1].clone().requires_grad_()
    wanted = penalty(bank.layout, row, start, weight)
    (gradient,) = torch.autograd.grad(wanted, row)
    found = pull_back(bank, 1, Job("ann", torch.zeros(1), (), start=start, distance=weight))
    assert found == pytest.approx(float(wanted.detach()), rel=1e-9, abs=1e-12)
    torch.testing.assert_close(bank.gradients[1], before[1] + gradient, rtol=1e-9, atol=1e-12)
    assert torch.equal(bank.gradients[[0, 2]], before[[0, 2]])
    assert squared_distance(bank.layout, start, start) == pytest.approx(0, abs=1e-9)


def test_no_penalty_without_a_start_or_from_an_adapter_that_does_nothing() -> None:
    bank = AdapterBank(Layout.of(SHAPES, 2), 1, alpha=8.0, trainable=True)
    assert bank.gradients is not None
    bank.values.fill_(1)
    for job in (
        Job("ann", torch.zeros(1), (), distance=1),
        Job("ann", torch.zeros(1), (), start=torch.zeros(bank.layout.width), distance=1),
    ):
        assert pull_back(bank, 0, job) == 0 and not bank.gradients.any()


def made(items: int, seed: int) -> tuple[EncodedExample, ...]:
    generator = torch.Generator().manual_seed(seed)
    return tuple(
        EncodedExample("ann", tuple(torch.randint(0, 48, (8,), generator=generator).tolist()), 5) for _ in range(items)
    )


def oracle(
    model: ProperModel,
    job: Job,
    config: UsersConfig,
    rate: float,
    passes: int | None = None,
    dtype: torch.dtype = torch.float64,
) -> Tensor:
    """The same training in the plainest way: autograd through whole products, AdamW written out."""
    assert job.start is not None
    bank = AdapterBank(model.user_layout(config), 1, alpha=config.alpha, trainable=True, dtype=dtype)
    assert bank.gradients is not None
    model.use_bank(bank)
    row, first, second = job.start.clone(), torch.zeros_like(job.start), torch.zeros_like(job.start)
    per_pass = -(-len(job.items) // config.batch_size)
    for step in range(per_pass * (passes or job.epochs)):
        epoch, at = divmod(step, per_pass)
        draw = torch.Generator().manual_seed(seed_of(0, "order", job.user, epoch))
        order = torch.randperm(len(job.items), generator=draw).tolist()
        batch = [job.items[i] for i in order[at * config.batch_size : (at + 1) * config.batch_size]]
        bank.values[0] = row
        bank.gradients.zero_()
        answers = sum(item.answers for item in batch)
        for item in batch:
            logits = logits_of(model, job, item)
            wanted = torch.tensor(item.ids[item.start :])
            loss = torch.nn.functional.cross_entropy(logits, wanted, reduction="sum") / answers
            torch.autograd.backward(loss)
        own = row.clone().requires_grad_()
        (pulled,) = torch.autograd.grad(penalty(bank.layout, own, job.start, job.distance), own)
        gradient = bank.gradients[0] + pulled
        gradient = gradient * min(1.0, config.clip / float(gradient.norm()))
        lr = rate * factor(step, per_pass * job.epochs, config.warmup, config.schedule)
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


def trained(job: Job, config: UsersConfig, rate: float) -> Tensor:
    found: list[FitResult] = []

    def done(results: Sequence[FitResult], again: bool) -> None:
        found.extend(results)

    with tempfile.TemporaryDirectory() as folder:
        trainer = MultiUserTrainer(MODEL, config, rate, 0, 2, pad=0)
        trainer.run([job], done, Checkpoint(Path(folder) / "checkpoint", 1e9), lambda facts: None, "fit")
    assert found[0].row is not None
    return found[0].row


@pytest.mark.parametrize("weight", [0.0, 0.5])
def test_going_on_from_an_adapter_is_what_the_slow_oracle_does(weight: float) -> None:
    config = UsersConfig(rank=2, batch_size=2)
    start = 0.1 * torch.randn(
        MODEL.user_layout(config).width, dtype=torch.float64, generator=torch.Generator().manual_seed(3)
    )
    embedding = torch.full((4,), 0.3, dtype=torch.float64)
    job = Job("ann", embedding, made(5, 1), epochs=3, start=start, distance=weight)
    found, slow = trained(job, config, 5e-3), oracle(MODEL, job, config, 5e-3)
    assert not torch.equal(found, start)
    torch.testing.assert_close(found, slow, rtol=1e-6, atol=1e-8)


def test_a_heavier_penalty_stays_nearer() -> None:
    config = UsersConfig(rank=2, batch_size=2)
    layout = MODEL.user_layout(config)
    start = 0.1 * torch.randn(layout.width, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    job = Job("ann", torch.full((4,), 0.3, dtype=torch.float64), made(5, 1), epochs=4, start=start)
    rows = [trained(replace(job, distance=weight), config, 2e-2) for weight in (0, 1, 100)]
    moved = [squared_distance(layout, row, start) for row in rows]
    assert moved[0] > moved[1] > moved[2] > 0
