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


def test_shares() -> None:
    sampler = Sampler(Sampling(temperature=0.5, seed=3))
    logits = torch.tensor([0.0, 0.5, -1.0])
    drawn = torch.bincount(torch.tensor([sampler.draw(logits) for _ in range(4000)]), minlength=3) / 4000
    assert drawn.tolist() == pytest.approx((logits / 0.5).softmax(-1).tolist(), abs=0.03)


@pytest.mark.parametrize("temperature", [1e-300, 1e-45, 1e-5])
def test_hardly_any_temperature_is_greedy(temperature: float) -> None:
    assert Sampler(Sampling(temperature=temperature, top_p=0.9)).draw(torch.tensor([1.0, 3.0, 2.0])) == 1


def test_a_row_of_nans_fails_nobody() -> None:
    logits = torch.tensor([[float("nan")] * 3, [0.0, 9.0, 0.0]])
    found = next_tokens(logits, [Sampler(Sampling(temperature=1.0)), Sampler(Sampling())])
    assert found[1] == 1 and 0 <= found[0] < 3
