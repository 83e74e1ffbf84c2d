"""Seeds that are the same everywhere, and a checkpoint that brings an optimizer back to the bit."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

from proper.errors import RunFolderError
from proper.training.checkpoint import Checkpoint, adamw_tensors, resume_adamw, seed_of


def test_seeds() -> None:
    assert seed_of(0, "adapter", "user") == 2882333760127651381
    parts = [(0, "a"), (0, "b"), (1, "a"), ("0", "a"), (0, "a", ""), ("0a",), (0, "ä")]
    seeds = [seed_of(*part) for part in parts]
    assert len(set(seeds)) == len(seeds) and all(0 <= seed < 2**63 for seed in seeds)


def test_a_file_that_is_replaced_as_a_whole(tmp_path: Path) -> None:
    checkpoint = Checkpoint(tmp_path / "stage.checkpoint", seconds=3600)
    assert checkpoint.load() is None and not checkpoint.due()
    checkpoint.save({"a": torch.ones(2)}, {"step": 1})
    checkpoint.save({"b": torch.zeros(1)}, {"step": 2})
    held = checkpoint.load()
    assert held is not None and held[1] == {"step": 2} and list(held[0]) == ["b"]
    checkpoint.path.write_bytes(checkpoint.path.read_bytes()[:-1])
    for read in (checkpoint.load, checkpoint.metadata):
        with pytest.raises(RunFolderError, match=r"stage.checkpoint: damaged .*; remove it, and its part"):
            read()
    checkpoint.remove()
    checkpoint.remove()
    assert checkpoint.load() is None and list(tmp_path.iterdir()) == []
    assert Checkpoint(tmp_path / "x", seconds=0).due()


def test_an_optimizer_goes_on_to_the_bit(tmp_path: Path) -> None:
    def step(parameters: list[nn.Parameter], optimizer: torch.optim.Optimizer, seed: int) -> None:
        generator = torch.Generator().manual_seed(seed)
        for parameter in parameters[:2]:  # the third never has a gradient
            parameter.grad = torch.randn(parameter.shape, generator=generator)
        optimizer.step()

    parameters = [nn.Parameter(torch.ones(3, 2)), nn.Parameter(torch.ones(4)), nn.Parameter(torch.ones(1))]
    optimizer = torch.optim.AdamW(parameters, lr=0.1, weight_decay=0.2)
    for seed in range(3):
        step(parameters, optimizer, seed)
    checkpoint = Checkpoint(tmp_path / "c", 0)
    names = [f"module.{at}" for at in range(3)]
    saved = adamw_tensors(optimizer, dict(zip(names, parameters, strict=True)))
    checkpoint.save({**saved, "further": torch.ones(2)}, {"step": 3})
    step(parameters, optimizer, 3)

    again = [nn.Parameter(torch.zeros_like(parameter)) for parameter in parameters]
    other = torch.optim.AdamW(again, lr=0.1, weight_decay=0.2)
    done, tensors = resume_adamw(checkpoint, other, dict(zip(names, again, strict=True)))
    assert done == 3 and tensors["further"].tolist() == [1, 1]
    step(again, other, 3)

    assert all(torch.equal(one, two) for one, two in zip(parameters, again, strict=True))


def test_without_a_checkpoint_a_loop_starts_at_step_0(tmp_path: Path) -> None:
    parameter = nn.Parameter(torch.ones(3))
    optimizer = torch.optim.AdamW([parameter])
    assert resume_adamw(Checkpoint(tmp_path / "c", 0), optimizer, {"a": parameter}) == (0, {})
    assert torch.equal(parameter, torch.ones(3)) and not optimizer.state
