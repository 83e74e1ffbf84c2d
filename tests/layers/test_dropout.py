"""Dropout from cheap random numbers: how much is dropped, and when."""

from __future__ import annotations

import pytest
import torch

from proper.layers.dropout import Dropout, dropout


def test_it_keeps_the_mean() -> None:
    torch.manual_seed(0)
    dropped = dropout(torch.ones(4, 50, 101), 0.25)
    assert float((dropped == 0).float().mean()) == pytest.approx(0.25, abs=0.01)
    assert sorted(set(dropped.unique().tolist())) == [0.0, pytest.approx(4 / 3)]


def test_it_never_rounds_to_none() -> None:
    torch.manual_seed(0)
    assert bool((dropout(torch.ones(1, 1000, 10), 1e-4) == 0).any())


def test_as_a_module_it_works_in_training_only() -> None:
    ones = torch.ones(7, 33)
    layer = Dropout(0.5)
    assert not torch.equal(layer(ones), ones)
    assert torch.equal(layer.eval()(ones), ones)
    assert torch.equal(Dropout(0.0)(ones), ones)
