"""Stages 2 and 3 from cached hidden states: the same result as from token ids, also with kills in between."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from proper.adapters.store import AdapterStore
from proper.config import Config
from proper.data.dataset import Dataset
from proper.models.checkpoints import load_tensors
from proper.models.lower_layers import HiddenStates
from proper.training.stages import StageRunner

STAGES = ("population", "groups", "users")


class Killed(BaseException):
    """Stands for a kill: nothing may catch it."""


def changed(config: Config, cache: int) -> Config:
    """Short stages in which the lower of two layers is not adapted; a checkpoint after every step."""
    raw = config.model_dump()
    raw["compute"] |= {"cache_mb": cache, "checkpoint_seconds": 1e-9}
    raw["population"] |= {"max_tokens": 200, "epochs": 1}
    raw["groups"] |= {"layers": 1, "epochs": 1, "batch_size": 5, "learning_rate": 2e-3}
    raw["users"] |= {"epochs": 2, "learning_rate": 5e-3, "dropout": 0.1, "storage": "fp32"}
    return Config.model_validate(raw)


def trained(config: Config, dataset: Dataset, folder: Path, kill: int | None = None) -> int:
    """Run the stages until the log has `kill` lines; return the number of lines."""
    lines = 0

    def log(_: object) -> None:
        nonlocal lines
        lines += 1
        if lines == kill:
            raise Killed

    folder.mkdir(exist_ok=True)
    StageRunner(config, dataset, folder, 0, log).run(STAGES)
    return lines


def results(folder: Path) -> dict[str, Tensor]:
    """All tensors that the stages made: experts, routers, embeddings and adapters."""
    found = dict(load_tensors(folder / "groups" / "groups.safetensors")[0])
    found |= {f"router.{name}": t for name, t in load_tensors(folder / "users" / "router.safetensors")[0].items()}
    store = AdapterStore(folder / "users")
    for user, _ in store.users():
        record = store.get(user)
        assert record is not None
        found[f"{user}.embedding"] = record.embedding
        found |= {f"{user}.{name}": tensor.float() for name, tensor in (record.adapter or {}).items()}
    store.close()
    return found


@pytest.fixture
def reads(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many texts were read from caches."""
    counts = [0]
    read = HiddenStates.read

    def counted(self: HiddenStates, ids: Any) -> Tensor:
        counts[0] += 1
        return read(self, ids)

    monkeypatch.setattr(HiddenStates, "read", counted)
    return counts


def test_experts_and_adapters_are_those_of_the_whole_model(
    settings: Config, dataset: Dataset, tmp_path: Path, reads: list[int]
) -> None:
    trained(changed(settings, 0), dataset, tmp_path / "whole")
    assert reads == [0]
    lines = trained(changed(settings, 64), dataset, tmp_path / "cached")
    found, expected = results(tmp_path / "cached"), results(tmp_path / "whole")
    assert found.keys() == expected.keys() and any(".mlp." in name and name[:3] == "ann" for name in found)
    for name, tensor in expected.items():
        torch.testing.assert_close(found[name], tensor, rtol=0, atol=1e-4, msg=name)
    assert reads[0] > lines, "several rows of every step come from the cache"
    for kill in (lines // 4, lines // 2, lines - 3):
        folder = tmp_path / f"killed {kill}"
        with pytest.raises(Killed):
            trained(changed(settings, 64), dataset, folder, kill)
        trained(changed(settings, 64), dataset, folder)
        again = results(folder)
        assert all(torch.equal(again[name], tensor) for name, tensor in found.items()), "the same bits"
