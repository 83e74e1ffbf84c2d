"""Rates over a run."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from proper.training.schedule import factor, factors, resolve_rate

SCHEDULES = ("cosine", "linear", "constant")


@given(
    totals=st.lists(st.integers(1, 400), min_size=1, max_size=6),
    share=st.floats(0, 1, exclude_max=True),
    warmup=st.floats(0, 0.9),
    schedule=st.sampled_from(SCHEDULES),
)
def test_many_users_at_once_have_the_factors_of_each(
    totals: list[int], share: float, warmup: float, schedule: str
) -> None:
    steps = [int(share * total) for total in totals]
    found = factors(torch.tensor(steps), torch.tensor(totals), warmup, schedule)
    expected = [factor(step, total, warmup, schedule) for step, total in zip(steps, totals, strict=True)]
    assert found.tolist() == pytest.approx(expected, abs=1e-12)


@given(total=st.integers(2, 200), warmup=st.floats(0, 0.5), schedule=st.sampled_from(SCHEDULES))
def test_rates_rise_then_fall(total: int, warmup: float, schedule: str) -> None:
    found = [factor(step, total, warmup, schedule) for step in range(total)]
    top = found.index(max(found))
    assert found[:top] == sorted(found[:top]) and found[top:] == sorted(found[top:], reverse=True)
    assert all(0 < value <= 1 for value in found)
    assert max(found) == 1


@pytest.mark.parametrize(("schedule", "half"), [("cosine", 0.5), ("linear", 0.5), ("constant", 1.0)])
def test_without_warmup(schedule: str, half: float) -> None:
    assert factor(0, 10, 0.0, schedule) == 1
    assert factor(5, 10, 0.0, schedule) == pytest.approx(half)


def test_warmup_starts_above_zero() -> None:
    assert [factor(step, 10, 0.3, "constant") for step in range(4)] == pytest.approx([0.25, 0.5, 0.75, 1.0])


def test_auto_scales_the_papers_rate_by_width() -> None:
    assert resolve_rate("auto", "population", 4096) == pytest.approx(3e-4)
    assert resolve_rate("auto", "groups", 320) == pytest.approx(2e-4 * 12.8)
    assert resolve_rate(5e-5, "groups", 320) == 5e-5
