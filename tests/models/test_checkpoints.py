"""Tensors and facts in one file."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from proper.errors import ProperError
from proper.models.checkpoints import load_tensors, save_tensors


def test_round_trip(tmp_path: Path) -> None:
    tensors = {"a/b": torch.randn(3, 4).t(), "c": torch.tensor(5), "d": torch.randn(2, requires_grad=True)}
    save_tensors(tmp_path / "x.safetensors", tensors, {"step": 3, "losses": [0.1, 1 / 3]})
    found, facts = load_tensors(tmp_path / "x.safetensors")
    assert found.keys() == tensors.keys() and facts == {"step": 3, "losses": [0.1, 1 / 3]}
    assert all(torch.equal(found[name], tensors[name]) for name in tensors)
    assert [path.name for path in tmp_path.iterdir()] == ["x.safetensors"]


def test_damage_is_named(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    with pytest.raises(ProperError, match="x.safetensors: damaged or unreadable"):
        load_tensors(path)
    save_tensors(path, {"a": torch.ones(100)}, {})
    path.write_bytes(path.read_bytes()[:-10])
    with pytest.raises(ProperError, match="x.safetensors: damaged or unreadable"):
        load_tensors(path)
