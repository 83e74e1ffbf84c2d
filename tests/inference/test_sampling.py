"""Draws follow the shares of the softmax, the nucleus, and the request's own seed; nothing odd raises."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import TopPLogitsWarper

from proper.inference.sampling import Sampler, Sampling, next_tokens, nucleus


@given(seed=st.integers(0, 99), mass=st.floats(0.05, 0.99))
def test_the_nucleus_is_transformers(seed: int, mass: float) -> None:
    scores = torch.randn(50, generator=torch.Generator().manual_seed(seed))
    expected = TopPLogitsWarper(mass)(torch.zeros(1, 1), scores[None])[0]
    assert torch.equal(nucleus(scores, mass), expected)


def test_no_mass_at_all_is_the_likeliest_token() -> None:
    """OpenAI's API allows `top_p: 0`."""
    assert Sampler(Sampling(temperature=2.0, top_p=0.0)).draw(torch.tensor([1.0, 3.0, 2.0])) == 1


def test_shares() -> None:
    sampler = Sampler(Sampling(temperature=0.5, seed=3))
    logits = torch.tensor([0.0, 0.5, -1.0])
    drawn = torch.bincount(torch.tensor([sampler.draw(logits) for _ in range(4000)]), minlength=3) / 4000
    assert drawn.tolist() == pytest.approx((logits / 0.5).softmax(-1).tolist(), abs=0.03)


@pytest.mark.parametrize("temperature", [1e-300, 1e-45, 1e-5])
def test_hardly_any_temperature_is_greedy(temperature: float) -> None:
    assert Sampler(Sampling(temperature=temperature, top_p=0.9)).draw(torch.tensor([1.0, 3.0, 2.0])) == 1


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_row_that_is_not_finite_fails_alone(bad: float, temperature: float) -> None:
    logits = torch.tensor([[1.0, bad, 2.0], [0.0, 9.0, 0.0], [-float("inf"), 9.0, -float("inf")], [-float("inf")] * 3])
    found = next_tokens(logits, [Sampler(Sampling(temperature=temperature * 0.01)) for _ in range(4)])
    assert found[1:3] == [1, 1]
    assert str(found[0]) == str(found[3]) == "the logits are not finite"
