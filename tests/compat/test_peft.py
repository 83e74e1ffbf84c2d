"""Stage 1's adapter is PEFT's: merged it is the same model, and plain PEFT reads the folder back."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM
from transformers.pytorch_utils import Conv1D

from proper.config import PopulationConfig
from proper.data.batching import Batch
from proper.models.backbone import Backbone, load_backbone
from proper.models.peft_merge import absorb, apply_population
from proper.models.targets import find_targets
from proper.training.population import wrap

CPU = torch.device("cpu")
CLOSE = {"rtol": 0, "atol": 1e-4}


def _logits(model: Any, batch: Batch) -> Tensor:
    with torch.no_grad():
        logits: Tensor = model(
            input_ids=batch.input_ids, attention_mask=batch.attention_mask, position_ids=batch.position_ids
        ).logits
    return logits * batch.attention_mask.unsqueeze(-1)


def _trained(backbone: Backbone, config: PopulationConfig) -> peft.PeftModel:
    """A LoRA as if it had been trained: no B is zero any more."""
    wrapped = wrap(backbone, config, seed=0)
    generator = torch.Generator().manual_seed(1)
    for name, parameter in wrapped.named_parameters():
        if "lora_B" in name:
            parameter.data.copy_(0.1 * torch.randn(parameter.shape, generator=generator))
    wrapped.eval()
    return wrapped


@pytest.fixture(scope="module")
def adapter(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder that stage 1 leaves."""
    path = tmp_path_factory.mktemp("population") / "population"
    _trained(load_backbone(str(folder), torch.float32, CPU), PopulationConfig()).save_pretrained(str(path))
    return path


def test_the_lora_sits_on_all_target_modules_and_nothing_else_learns(backbone: Backbone, family: Any) -> None:
    targets = find_targets(backbone.model, "all")
    wrapped = wrap(backbone, PopulationConfig(), seed=0)
    learning = [name for name, parameter in wrapped.named_parameters() if parameter.requires_grad]
    assert len(learning) == 2 * len(targets) == 4 * len(family.ffn + family.attention)
    assert all(".lora_A." in name or ".lora_B." in name for name in learning)


def test_merged_equals_wrapped(backbone: Backbone, batch: Batch) -> None:
    before = _logits(backbone.model, batch)
    names = find_targets(backbone.model, "all")
    wrapped = _trained(backbone, PopulationConfig())
    expected = _logits(wrapped, batch)
    absorb(backbone, wrapped)
    after = _logits(backbone.model, batch)
    torch.testing.assert_close(after, expected, **CLOSE)
    assert (after - before).abs().max() > 0.1
    assert not any("lora" in name for name, _ in backbone.model.named_modules())
    assert find_targets(backbone.model, "all") == names
    assert not any(parameter.requires_grad for parameter in backbone.model.parameters())


def test_plain_peft_reads_the_folder_on_the_untouched_backbone(folder: Path, adapter: Path, batch: Batch) -> None:
    plain = AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager")
    ours = load_backbone(str(folder), torch.float32, CPU)
    apply_population(ours, adapter)
    theirs = peft.PeftModel.from_pretrained(plain, str(adapter))
    torch.testing.assert_close(_logits(ours.model, batch), _logits(theirs, batch), **CLOSE)
    assert (_logits(ours.model, batch) - _logits(theirs.unload(), batch)).abs().max() > 0.1


def test_bf16_weights_are_merged_in_fp32_and_rounded_once(folder: Path, adapter: Path, batch: Batch) -> None:
    backbone = load_backbone(str(folder), torch.bfloat16, CPU)
    before = {name: backbone.model.get_submodule(name).weight.clone() for name in find_targets(backbone.model, "all")}
    saved = peft.load_peft_weights(str(adapter), device="cpu")
    config = PopulationConfig()
    apply_population(backbone, adapter)
    for name, old in before.items():
        module = backbone.model.get_submodule(name)
        down, up = (saved[f"base_model.model.{name}.lora_{side}.weight"] for side in "AB")
        delta = config.alpha / config.rank * (up @ down)
        exact = old.float() + (delta.T if isinstance(module, Conv1D) else delta)
        assert module.weight.dtype == torch.bfloat16
        # The sum may be half a last place off in fp32, which rounding can turn into one last place of bf16.
        torch.testing.assert_close(module.weight.float(), exact, rtol=2**-8, atol=1e-6)
        assert (module.weight == exact.bfloat16()).float().mean() > 0.999
    assert torch.isfinite(_logits(backbone.model, batch)).all()


def test_the_same_seed_draws_the_same_lora(llama: Path) -> None:
    def drawn(seed: int) -> dict[str, Tensor]:
        wrapped = wrap(load_backbone(str(llama), torch.float32, CPU), PopulationConfig(), seed)
        return {name: p.detach() for name, p in wrapped.named_parameters() if "lora_A" in name}

    first, again, other = drawn(0), drawn(0), drawn(1)
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not any(torch.equal(first[name], other[name]) for name in first)
