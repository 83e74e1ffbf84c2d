"""Stage 1 into the backbone, against PEFT's own forward."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from torch import Tensor

from proper.errors import ProperError
from proper.models.backbone import Backbone
from proper.models.peft_merge import absorb, apply_population


def wrapped(backbone: Backbone) -> PeftModel:
    model = get_peft_model(
        backbone.model,
        LoraConfig(task_type="CAUSAL_LM", r=4, lora_alpha=8, target_modules=["q_proj", "down_proj"], lora_dropout=0.5),
    )
    generator = torch.Generator().manual_seed(5)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.data.copy_(0.1 * torch.randn(parameter.shape, generator=generator))
    assert isinstance(model, PeftModel)
    return model.eval()


def logits(model: torch.nn.Module) -> Tensor:
    with torch.no_grad():
        found: Tensor = model(input_ids=torch.arange(3, 43).view(2, 20)).logits
    return found


def test_merged_weights_answer_as_peft_does(backbone: Callable[..., Backbone], tmp_path: Path) -> None:
    one, other = backbone(), backbone()
    plain = logits(one.model)
    lora = wrapped(one)
    lora.save_pretrained(str(tmp_path))
    expected = logits(lora)

    absorb(one, lora)
    apply_population(other, tmp_path)

    assert float((logits(one.model) - expected).abs().max()) < 1e-4
    assert torch.equal(logits(one.model), logits(other.model)), "after a restart the model is the same"
    assert float((expected - plain).abs().max()) > 0.1
    assert not any("lora" in name for name, _ in one.model.named_parameters())
    assert not any(parameter.requires_grad for parameter in one.model.parameters())


def test_bf16_weights_are_rounded_once(backbone: Callable[..., Backbone]) -> None:
    low = backbone(torch.bfloat16)
    before = low.model.get_submodule("model.layers.0.mlp.down_proj").weight.detach().clone()
    lora = wrapped(low)
    layer = lora.base_model.model.get_submodule("model.layers.0.mlp.down_proj")
    a, b = (part["default"].weight.detach().float() for part in (layer.lora_A, layer.lora_B))

    absorb(low, lora)

    merged = low.model.get_submodule("model.layers.0.mlp.down_proj").weight
    expected = (before.float() + 2.0 * (b @ a)).bfloat16()
    assert merged.dtype == torch.bfloat16
    assert float((merged == expected).float().mean()) > 0.999
    assert float((merged.float() - expected.float()).abs().max()) < 0.01


def lost(tensors: dict[str, Tensor], config: dict[str, Any]) -> None:
    del tensors[min(tensors)]


def small(tensors: dict[str, Tensor], config: dict[str, Any]) -> None:
    tensors[min(tensors)] = torch.zeros(3)


def mistyped(tensors: dict[str, Tensor], config: dict[str, Any]) -> None:
    config["bias"] = []


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (lost, r"adapter_model\.safetensors: the tensor 'base_model\.\S+' is missing"),
        (small, "not readable as a PEFT adapter: "),
        (mistyped, "not readable as a PEFT adapter: "),
    ],
)
def test_a_damaged_adapter_is_named(
    backbone: Callable[..., Backbone], tmp_path: Path, damage: Callable[..., None], said: str
) -> None:
    wrapped(backbone()).save_pretrained(str(tmp_path))
    weights, settings = tmp_path / "adapter_model.safetensors", tmp_path / "adapter_config.json"
    tensors, config = load_file(weights), json.loads(settings.read_text())
    damage(tensors, config)
    save_file(tensors, weights)
    settings.write_text(json.dumps(config))
    with pytest.raises(ProperError, match=said):
        apply_population(backbone(), tmp_path)
