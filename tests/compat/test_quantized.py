"""A backbone with int8 weights (torchao, which runs on CPU): all stages train beside them, and answers come out."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, TorchAoConfig

import proper
from proper.data.batching import Batch
from proper.errors import InputError
from proper.export.run_export import export_backbone, export_user
from proper.models.answer_loss import answer_loss
from proper.models.backbone import Backbone, digest, load_backbone
from proper.models.peft_merge import apply_population
from proper.models.targets import find_targets

torchao = pytest.importorskip("torchao.quantization", reason="torchao is not installed")

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def int8(llama: Path, tokenizer: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny Llama with int8 weights in its linear layers, saved as such."""
    folder = tmp_path_factory.mktemp("quantized") / "int8"
    settings = TorchAoConfig(torchao.Int8WeightOnlyConfig())
    model = AutoModelForCausalLM.from_pretrained(llama, quantization_config=settings, dtype=torch.float32)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def _is_int8(module: nn.Module) -> bool:
    return type(module.weight).__name__ == "Int8Tensor"


def test_a_quantized_folder_is_recognized(int8: Path, llama: Path, batch: Batch) -> None:
    backbone = load_backbone(str(int8), torch.float32, CPU)
    dense = load_backbone(str(llama), torch.float32, CPU)
    assert backbone.quantized and backbone.device == CPU and backbone.hidden_size == 32
    targets = find_targets(backbone.model, "all")
    assert targets == find_targets(dense.model, "all")
    assert all(_is_int8(backbone.model.get_submodule(name)) for name in targets)
    assert backbone.digest == load_backbone(str(int8), torch.float32, CPU).digest != dense.digest
    backbone.model.get_submodule(next(iter(targets))).weight.qdata[0] += 1
    assert digest(backbone.model) != backbone.digest


def _dequantized(folder: Path) -> Backbone:
    """The same numbers in ordinary weights."""
    backbone = load_backbone(str(folder), torch.float32, CPU)
    for name in find_targets(backbone.model, "all"):
        module = backbone.model.get_submodule(name)
        module.weight = nn.Parameter(module.weight.dequantize(), requires_grad=False)
    return backbone


def test_logits_and_gradients_are_those_of_the_dequantized_weights(int8: Path, batch: Batch, personalize: Any) -> None:
    found = []
    for backbone in (load_backbone(str(int8), torch.float32, CPU), _dequantized(int8)):
        personal = personalize(backbone)
        personal.fill()
        trained = {**personal.model.group_parameters(), **personal.model.router_parameters()}
        for parameter in trained.values():
            parameter.requires_grad_(True)
        logits = personal.model.answer_logits(batch, personal.rows([0, 1, 2, 3]))
        answer_loss(logits, batch.labels)[0].sum().backward()
        gradients = {name: parameter.grad for name, parameter in trained.items()}
        found.append({"logits": logits.detach(), "bank": personal.bank.gradients, **gradients})
    quantized, dense = found
    for name, expected in dense.items():
        torch.testing.assert_close(quantized[name], expected, rtol=1e-3, atol=1e-4, msg=lambda t, n=name: f"{n}: {t}")
        assert expected.abs().max() > 0


@pytest.fixture(scope="module", params=["fp32", "bf16"])
def run(int8: Path, job: Any, request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """All three stages on int8 weights."""
    folder = tmp_path_factory.mktemp("runs") / "int8"
    config = job.config(int8, compute={"dtype": request.param})
    return proper.run(config, folder, stages=("population", "groups", "users"))


def test_stage_1_is_kept_beside_the_weights(run: Path, int8: Path, batch: Batch) -> None:
    backbone = load_backbone(str(int8), torch.float32, CPU)
    targets = find_targets(backbone.model, "all")
    before = {name: backbone.model.get_submodule(name).weight.qdata.clone() for name in targets}
    base = _logits(backbone.model, batch)
    apply_population(backbone, run / "population")
    for name in targets:
        module = backbone.model.get_submodule(name)
        assert isinstance(module, LoraLayer) and torch.equal(module.get_base_layer().weight.qdata, before[name])
    assert not any(parameter.requires_grad for parameter in backbone.model.parameters())
    assert find_targets(backbone.model, "all") == targets
    ours = _logits(backbone.model, batch)
    assert (ours - base).abs().max() > 1e-3
    plain = AutoModelForCausalLM.from_pretrained(int8, dtype=torch.float32, attn_implementation="eager")
    theirs = peft.PeftModel.from_pretrained(plain, str(run / "population"))
    torch.testing.assert_close(ours, _logits(theirs, batch), rtol=0, atol=1e-4)


def test_stages_2_and_3_train_on_top_and_everybody_gets_an_answer(run: Path) -> None:
    model = proper.load(run)
    inside = model.personalized.model
    layer = next(iter(inside.layers.values()))
    assert isinstance(layer.base, LoraLayer) and _is_int8(layer.base.get_base_layer())
    assert all(parameter.abs().max() > 0 for parameter in inside.group_parameters().values())
    users = [user for user in model.users][:3]
    who = [*users, None]
    prompts = ["Tag this note: the roof leaks again.", "Tag this note: soup.", "Tag: a long walk home.", "Tag this."]
    together = model.generate(prompts, who, max_new_tokens=6)
    assert len(together) == 4 and any(together)
    if model.config.compute.dtype == "fp32":  # in bf16, near ties may fall either way
        assert together == [model.generate([p], [u], max_new_tokens=6)[0] for p, u in zip(prompts, who, strict=True)]
    assert [answer.tier for answer in model.respond(prompts, who)] == ["users", "users", "users", "none"]
    scores = model.score(prompts, who, ["one", "two words"])
    assert scores.shape == (4, 2) and bool((scores < 0).all())
    model.close()


def _logits(model: Any, batch: Batch) -> Tensor:
    with torch.no_grad():
        inputs = {"input_ids": batch.input_ids, "attention_mask": batch.attention_mask}
        return model(**inputs, position_ids=batch.position_ids).logits * batch.attention_mask.unsqueeze(-1)


def test_there_is_no_merged_backbone_to_export(run: Path, tmp_path: Path) -> None:
    out, refused = tmp_path / "out", "its backbone is quantized"
    with pytest.raises(InputError, match=refused):
        export_backbone(run, out)
    user = next(iter(proper.load(run).users))
    with pytest.raises(InputError, match=refused):
        export_user(run, user, out, form="peft")
    assert not list(tmp_path.iterdir())
    export_user(run, user, out)
