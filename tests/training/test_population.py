"""Stage 1 through PEFT: what is trained, what is written, and what the backbone is afterwards."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from torch import Tensor

from proper.config import PopulationConfig
from proper.data.batching import Batch, collate
from proper.data.dataset import Dataset
from proper.data.encoder import Encoder
from proper.layers.dropout import Dropout
from proper.models.answer_loss import answer_logits
from proper.models.backbone import Backbone
from proper.models.peft_merge import apply_population
from proper.training.population import train_population, wrap
from proper.training.trainer import TrainingPlan

Make = Callable[..., Backbone]


class Stopped(Exception):
    """What a test throws into a run."""


@pytest.fixture
def batch(dataset: Dataset, encoder: Encoder) -> Batch:
    return collate([encoder.encode(row) for row in dataset.history("bob")], pad=0)


@pytest.fixture
def run(
    backbone: Make, plan: Callable[..., TrainingPlan], accelerator: Accelerator, tmp_path: Path
) -> Callable[..., Backbone]:
    def fit(
        config: PopulationConfig, folder: str = "population", dtype: torch.dtype = torch.float32, **options: Any
    ) -> Backbone:
        made = backbone(dtype)
        train_population(made, config, plan(config, **options), (), accelerator, tmp_path / folder)
        return made

    return fit


def logits_of(backbone: Backbone, batch: Batch) -> Tensor:
    with torch.no_grad():
        return answer_logits(backbone.model, batch)


def config(**changed: Any) -> PopulationConfig:
    return PopulationConfig.model_validate({"epochs": 1, "batch_size": 8, "rank": 4, "alpha": 8} | changed)


def test_the_folder_is_pefts_and_gives_the_same_model(
    run: Callable[..., Backbone], backbone: Make, batch: Batch, tmp_path: Path
) -> None:
    log: list[dict[str, Any]] = []
    trained = run(config(epochs=4), log=log)
    again = backbone()
    apply_population(again, tmp_path / "population")
    assert torch.equal(logits_of(trained, batch), logits_of(again, batch))
    assert not torch.allclose(logits_of(trained, batch), logits_of(backbone(), batch), atol=1e-2)
    assert {path.name for path in (tmp_path / "population").iterdir()} >= {
        "adapter_config.json",
        "adapter_model.safetensors",
    }
    assert log[-1]["loss"] < 0.98 * log[0]["loss"] and log[0]["stage"] == "population"
    assert not any(p.requires_grad for p in trained.model.parameters()) and not trained.model.training


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gradient_checkpointing_changes_nothing(run: Callable[..., Backbone], batch: Batch, dtype: torch.dtype) -> None:
    kept = run(config(), "kept", dtype, name="kept")
    again = run(config(gradient_checkpointing=True), "again", dtype, name="again")
    assert torch.allclose(logits_of(again, batch), logits_of(kept, batch), atol=1e-4)
    assert again.model.dtype == dtype and not answer_logits(again.model, batch).requires_grad


def test_a_resumed_run_gives_the_same_bits(run: Callable[..., Backbone], batch: Batch) -> None:
    whole = run(config(gradient_accumulation=2), "whole", name="whole")
    steps: list[dict[str, Any]] = []

    def told(facts: dict[str, Any]) -> None:
        steps.append(facts)
        if len(steps) == 3:
            raise Stopped

    with pytest.raises(Stopped):
        run(config(gradient_accumulation=2), "cut", log=told, seconds=0, name="cut")
    resumed = run(config(gradient_accumulation=2), "cut", seconds=0, name="cut")
    assert torch.equal(logits_of(resumed, batch), logits_of(whole, batch))


def test_the_lora_is_fp32_follows_its_seed_and_covers_the_targets(backbone: Make) -> None:
    def lora(seed: int, **changed: Any) -> dict[str, Tensor]:
        wrapped = wrap(backbone(torch.bfloat16), config(**changed), seed)
        return {name: p for name, p in wrapped.named_parameters() if p.requires_grad}

    one, same, other = lora(0), lora(0), lora(1)
    assert len(one) == 2 * 14 and all(p.dtype == torch.float32 for p in one.values())
    assert all(torch.equal(one[name], same[name]) for name in one)
    assert not any(torch.equal(one[name], other[name]) for name in one if "lora_A" in name)
    assert not any(p.any() for name, p in one.items() if "lora_B" in name)
    assert len(lora(0, target_modules="attention")) == 2 * 8
    assert len(lora(0, target_modules=["up_proj"])) == 2 * 2


def test_every_lora_drops_out_while_it_trains_and_none_without_a_rate(backbone: Make, batch: Batch) -> None:
    def twice(rate: float, training: bool) -> bool:
        wrapped = wrap(backbone(), PopulationConfig(dropout=rate), 0).train(training)
        for name, parameter in wrapped.named_parameters():
            if "lora_B" in name:
                parameter.data.fill_(0.1)
        return torch.equal(answer_logits(wrapped, batch), answer_logits(wrapped, batch))

    assert not twice(0.5, training=True)
    assert twice(0.5, training=False)
    assert twice(0.0, training=True)
    dropouts = [m for m in wrap(backbone(), PopulationConfig(dropout=0.5), 0).modules() if isinstance(m, Dropout)]
    assert dropouts and {one.rate for one in dropouts} == {0.5}
