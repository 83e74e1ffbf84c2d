"""Embeddings fitted in one batch are those of the slow version, which takes one user and one item at a time."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from proper.config import GroupsConfig
from proper.data.batching import collate
from proper.data.encoder import EncodedExample
from proper.enrolment.fit_embedding import (
    MIN_RELATIVE_RATE,
    EmbeddingJob,
    FittedEmbedding,
    Setting,
    fit_embedding,
    fit_embeddings,
)
from proper.errors import NonFiniteLossError
from proper.layers.batch_context import RowContext
from proper.models.personal import ProperModel
from proper.training.checkpoint import seed_of
from proper.training.optim import rate_factor

CONFIG = GroupsConfig(user_embedding=16, epochs=2)


@pytest.fixture(scope="module")
def setting(grouped: Callable[..., ProperModel]) -> Setting:
    return Setting(grouped(), CONFIG, 0, lambda: None)


def made(user: str, count: int, held_out: int, seed: int, trial: bool = False) -> EmbeddingJob:
    draw = torch.Generator().manual_seed(seed)

    def item() -> EncodedExample:
        prompt, answer = (int(torch.randint(low, high, (1,), generator=draw)) for low, high in ((3, 12), (1, 4)))
        ids = torch.randint(3, 60, (prompt + answer,), generator=draw).tolist()
        return EncodedExample(user, tuple(ids), prompt)

    start, other = torch.randn(2, 16, generator=draw)
    return EmbeddingJob(user, [item() for _ in range(count)], held_out, start, other if trial else None)


def slow(setting: Setting, job: EmbeddingJob) -> FittedEmbedding:
    """One user, one item at a time, Adam written out."""

    def loss(item: EncodedExample, embedding: Tensor) -> tuple[Tensor, Tensor]:
        total, tokens = setting.model.answer_losses(collate([item], 0), RowContext("groups", embedding=embedding[None]))
        return total.sum(), tokens.sum()

    def descend(items: list[EncodedExample], start: Tensor, passes: int) -> list[Tensor]:
        value, first, second, found = start.clone(), torch.zeros(16), torch.zeros(16), [start]
        steps = 2 * len(items)
        for step in range(passes * len(items)):
            epoch, at = divmod(step, len(items))
            draw = torch.Generator().manual_seed(seed_of(0, "embedding", job.user, epoch))
            own = value.clone().requires_grad_()
            total, tokens = loss(items[int(torch.randperm(len(items), generator=draw)[at])], own)
            (gradient,) = torch.autograd.grad(total / tokens, own)
            first, second = 0.9 * first + 0.1 * gradient, 0.999 * second + 0.001 * gradient**2
            spread = (second / (1 - 0.999 ** (step + 1))).sqrt() + 1e-8
            rate = max(1e-2, MIN_RELATIVE_RATE) * rate_factor(step, steps, CONFIG.warmup, CONFIG.schedule)
            value = value - rate * first / (1 - 0.9 ** (step + 1)) / spread
            if at == len(items) - 1:
                found.append(value)
        return found

    if not job.held_out:
        return FittedEmbedding(descend(list(job.items), job.start, 2)[-1], (), 2)
    older, newest = list(job.items[: -job.held_out]), job.items[-job.held_out :]
    losses = []
    for each in descend(older, job.start if job.trial_start is None else job.trial_start, 2):
        with torch.no_grad():
            sums = [loss(item, each) for item in newest]
        losses.append(float(sum(total for total, _ in sums)) / float(sum(tokens for _, tokens in sums)))
    passes = losses.index(min(losses))
    return FittedEmbedding(descend(list(job.items), job.start, passes)[-1], tuple(losses), passes)


@settings(max_examples=5)
@given(
    st.lists(st.tuples(st.integers(1, 5), st.integers(0, 2), st.booleans()), min_size=1, max_size=5),
    st.integers(0, 99),
)
def test_many_are_fitted_as_each_alone(setting: Setting, shapes: list[tuple[int, int, bool]], seed: int) -> None:
    jobs = [
        made(f"u{at}", count, min(held, count - 1), seed + at, trial) for at, (count, held, trial) in enumerate(shapes)
    ]
    for job, found in zip(jobs, fit_embeddings(setting, jobs), strict=True):
        assert isinstance(found, FittedEmbedding)
        expected = slow(setting, job)
        assert found.passes == expected.passes
        torch.testing.assert_close(found.embedding, expected.embedding, rtol=0, atol=2e-3)
        torch.testing.assert_close(torch.tensor(found.losses), torch.tensor(expected.losses), rtol=0, atol=1e-3)


def test_no_pass_keeps_the_placed_embedding_of_all_items(setting: Setting) -> None:
    job = made("ann", 6, 2, 0, trial=True)
    found = [fit_embedding(setting, made("ann", 6, 2, seed, trial=True)) for seed in range(12)]
    kept = [seed for seed, each in enumerate(found) if each.passes == 0]
    assert kept and len(kept) < 12
    assert all(torch.equal(found[seed].embedding, made("ann", 6, 2, seed, trial=True).start) for seed in kept)
    assert job.trial_start is not None and not torch.equal(job.start, job.trial_start)


def test_a_loss_that_is_not_finite_stops_its_user_only(setting: Setting) -> None:
    good, bad = made("ann", 4, 1, 1), made("bob", 4, 1, 2)
    bad = EmbeddingJob("bob", bad.items, 1, torch.full((16,), math.nan))
    found = fit_embeddings(setting, [bad, good])
    assert isinstance(found[0], NonFiniteLossError) and isinstance(found[1], FittedEmbedding)
    torch.testing.assert_close(found[1].embedding, fit_embedding(setting, good).embedding, rtol=0, atol=2e-3)
    with pytest.raises(NonFiniteLossError, match="the embedding's loss is not finite"):
        fit_embedding(setting, bad)
