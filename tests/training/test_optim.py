"""Learning rates over a run; row-wise AdamW against torch's, and rows that must not move."""

from __future__ import annotations

import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from proper.training.optim import RowAdamW, clip_rows, rate_factor, resolve_rate


def draws(seed: int, *shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("decay", [0.0, 0.1])
def test_with_all_rows_present_it_is_torchs_adamw(decay: float) -> None:
    values = draws(0, 4, 30)
    parameter = nn.Parameter(values.clone())
    theirs = torch.optim.AdamW([parameter], lr=1.0, weight_decay=decay)
    ours = RowAdamW.of(values, weight_decay=decay)
    for step in range(20):
        gradient, rate = draws(step + 1, 4, 30) * 10.0 ** (step % 4 - 2), 0.1 / (step + 1)
        parameter.grad = gradient.clone()
        theirs.param_groups[0]["lr"] = rate
        theirs.step()
        ours.step(values, torch.arange(4), gradient, rate)
    assert float((values - parameter.detach()).abs().max()) < 1e-6


@given(
    present=st.lists(st.sets(st.integers(0, 3), min_size=1), min_size=1, max_size=12),
    decay=st.sampled_from([0.0, 0.3]),
    seed=st.integers(0, 2**31),
)
@settings(max_examples=30)
def test_every_row_is_trained_as_if_it_were_alone(present: list[set[int]], decay: float, seed: int) -> None:
    values = draws(seed, 4, 5)
    alone = [nn.Parameter(row.clone()) for row in values]
    theirs = [torch.optim.AdamW([row], lr=1.0, weight_decay=decay) for row in alone]
    ours = RowAdamW.of(values, weight_decay=decay)
    for step, users in enumerate(present):
        rows = sorted(users, reverse=bool(step % 2))
        gradients, rates = draws(seed + step + 1, len(rows), 5), (torch.rand(len(rows)) * 0.1).tolist()
        before = copy.deepcopy((values, ours.first, ours.second, ours.steps))

        ours.step(values, torch.tensor(rows), gradients, rates)

        absent = sorted(set(range(4)) - users)
        for old, new in zip(before, (values, ours.first, ours.second, ours.steps), strict=True):
            assert torch.equal(old[absent], new[absent]), "absent rows stay to the bit"
        for row, gradient, rate in zip(rows, gradients, rates, strict=True):
            alone[row].grad = gradient.clone()
            theirs[row].param_groups[0]["lr"] = rate
            theirs[row].step()
    for row, expected in enumerate(alone):
        assert torch.allclose(values[row], expected.detach(), rtol=1e-5, atol=1e-6)
        assert int(ours.steps[row]) == sum(row in users for users in present)


def test_a_reset_row_starts_again() -> None:
    values = draws(0, 2, 3)
    optimizer, fresh = RowAdamW.of(values), RowAdamW.of(values)
    for step in range(5):
        optimizer.step(values, torch.arange(2), draws(step, 2, 3), 0.1)
    kept = optimizer.first[0].clone()
    optimizer.reset(1)
    assert torch.equal(optimizer.first[0], kept)
    one, other = values.clone(), values.clone()
    optimizer.step(one, torch.tensor([1]), draws(9, 1, 3), 0.1)
    fresh.step(other, torch.tensor([1]), draws(9, 1, 3), 0.1)
    assert torch.equal(one, other)


def test_state_goes_through_a_checkpoint() -> None:
    values = draws(0, 3, 4)
    optimizer = RowAdamW.of(values)
    for step in range(3):
        optimizer.step(values, torch.tensor([0, 2]), draws(step, 2, 4), 0.1)
    saved = {name: tensor.clone() for name, tensor in optimizer.tensors().items()}
    again, copied = RowAdamW.of(values), values.clone()
    again.restore(saved)
    optimizer.step(values, torch.arange(3), draws(7, 3, 4), 0.1)
    again.step(copied, torch.arange(3), draws(7, 3, 4), 0.1)
    assert torch.equal(values, copied)


@given(rows=st.integers(1, 5), width=st.integers(1, 6), limit=st.floats(0.01, 10), seed=st.integers(0, 2**31))
@settings(max_examples=40)
def test_rows_are_clipped_by_their_own_norm(rows: int, width: int, limit: float, seed: int) -> None:
    gradients = draws(seed, rows, width) * torch.logspace(-3, 3, rows).unsqueeze(1)
    clipped = clip_rows(gradients, limit)
    for found, row in zip(clipped, gradients, strict=True):
        norm = sum(float(x) ** 2 for x in row) ** 0.5
        expected = row if norm <= limit else row * (limit / norm)
        assert torch.allclose(found, expected, rtol=1e-5)


def test_clipping_zeros_and_infinities() -> None:
    assert torch.equal(clip_rows(torch.zeros(2, 3), 1.0), torch.zeros(2, 3))
    mixed = torch.tensor([[3.0, 4.0], [float("inf"), 0.0]])
    assert torch.allclose(clip_rows(mixed, 1.0)[0], torch.tensor([0.6, 0.8])), "a bad row spoils no other"


SCHEDULES = ("cosine", "linear", "constant")


@given(total=st.integers(2, 200), warmup=st.floats(0, 0.5), schedule=st.sampled_from(SCHEDULES))
def test_rates_rise_then_fall(total: int, warmup: float, schedule: str) -> None:
    found = [rate_factor(step, total, warmup, schedule) for step in range(total)]
    top = found.index(max(found))
    assert found[:top] == sorted(found[:top]) and found[top:] == sorted(found[top:], reverse=True)
    assert all(0 < value <= 1 for value in found)
    assert max(found) == 1


@pytest.mark.parametrize(("schedule", "half"), [("cosine", 0.5), ("linear", 0.5), ("constant", 1.0)])
def test_without_warmup(schedule: str, half: float) -> None:
    assert rate_factor(0, 10, 0.0, schedule) == 1
    assert rate_factor(5, 10, 0.0, schedule) == pytest.approx(half)


def test_warmup_starts_above_zero() -> None:
    assert [rate_factor(step, 10, 0.3, "constant") for step in range(4)] == pytest.approx([0.25, 0.5, 0.75, 1.0])


def test_auto_scales_the_papers_rate_by_width() -> None:
    assert resolve_rate("auto", "population", 4096) == pytest.approx(3e-4)
    assert resolve_rate("auto", "groups", 320) == pytest.approx(2e-4 * 12.8)
    assert resolve_rate(5e-5, "groups", 320) == 5e-5
