"""Every family of backbones: modules found, rows that do not see each other, decoding and scoring as without cache."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM
from transformers.pytorch_utils import Conv1D

from proper.config import GroupsConfig
from proper.data.batching import Batch, collate
from proper.data.encoder import EncodedExample
from proper.inference.forward import prefill
from proper.inference.kv_cache import RowCache
from proper.inference.prefix_cache import CachedPrefix
from proper.inference.sampling import Sampling
from proper.inference.score import score_labels
from proper.layers.batch_context import RowContext
from proper.layers.personalized_linear import AdaptedLinear
from proper.models.answer_loss import answer_loss
from proper.models.backbone import Backbone, load_backbone
from proper.models.gradient_checkpointing import gradient_checkpointing
from proper.models.personal import ProperModel
from proper.models.targets import decoder_layers, expert_targets, find_targets, linear_shape
from tests import decoding

CPU = torch.device("cpu")
CLOSE = {"rtol": 0, "atol": 1e-4}


def test_the_modules_of_every_layer_are_found(family: Any, backbone: Backbone) -> None:
    ffn, attention = set(family.ffn), set(family.attention)
    for wanted, expected in (("ffn", ffn), ("auto", ffn), ("attention", attention), ("all", ffn | attention)):
        found = find_targets(backbone.model, wanted)
        assert sorted(re.sub(r"^.*\.\d\.", "", name) for name in found) == sorted([*expected] * 2)
    for name, (inputs, outputs) in find_targets(backbone.model, "all").items():
        module = backbone.model.get_submodule(name)
        assert module(torch.randn(1, 2, inputs)).shape == (1, 2, outputs) and linear_shape(module) == (inputs, outputs)


def test_the_last_layers_are_those_that_run_last(backbone: Backbone) -> None:
    order: list[str] = []
    every = find_targets(backbone.model, "ffn")
    for name in every:
        module = backbone.model.get_submodule(name)
        module.register_forward_pre_hook(lambda _, __, name=name: order.append(name))
    backbone.model(torch.tensor([[3, 4, 5]]))
    half = len(order) // 2
    last = expert_targets(backbone.model, GroupsConfig(layers=1))
    assert {*last} == {*order[half:]} and {name: every[name] for name in last} == last
    assert expert_targets(backbone.model, GroupsConfig(layers=2)) == every


def test_a_module_is_meant_by_any_dotted_ending(family: Any, backbone: Backbone) -> None:
    ending = family.ffn[0]
    by_ending = find_targets(backbone.model, [ending])
    assert len(by_ending) == 2 and all(name.endswith(f".{ending}") for name in by_ending)
    one = next(iter(by_ending))
    assert list(find_targets(backbone.model, [one])) == [one]


def test_a_saved_folder_loads_frozen_and_equal(folder: Path, backbone: Backbone, batch: Batch) -> None:
    plain = AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager")
    inputs = {"input_ids": batch.input_ids, "attention_mask": batch.attention_mask, "position_ids": batch.position_ids}
    with torch.no_grad():
        assert torch.equal(backbone.model(**inputs).logits, plain(**inputs).logits)
    assert not any(p.requires_grad for p in backbone.model.parameters()) and not backbone.model.training
    assert backbone.hidden_size == 32 and not backbone.quantized and backbone.device == CPU
    assert backbone.digest == load_backbone(str(folder), torch.float32, CPU).digest


def test_nothing_changes_before_training(personal: Any, batch: Batch) -> None:
    bank = personal.bank
    for slot in range(bank.slots):
        bank.fresh(slot, torch.Generator().manual_seed(slot))
    with torch.no_grad():
        base = personal.model.answer_logits(batch, RowContext())
        assert torch.equal(personal.model.answer_logits(batch, personal.rows([0, 1, 2, 3])), base)


def test_a_row_does_not_see_its_neighbours(personal: Any, encoded: list[EncodedExample], batch: Batch) -> None:
    personal.fill()
    users = [1, 0, 3, 1]
    with torch.no_grad():
        base = personal.model.answer_logits(batch, RowContext())
        mixed = personal.model.answer_logits(batch, personal.rows(users))
        other = personal.model.answer_logits(batch, personal.rows([0, 1, 2, 3]))
        for at, row in enumerate(encoded):
            alone = collate([row], pad=0)
            answer = alone.labels.shape[1]
            logits = personal.model.answer_logits(alone, personal.rows([users[at]]))[0]
            torch.testing.assert_close(mixed[at, -answer:], logits, **CLOSE)
            assert (logits - base[at, -answer:]).abs().max() > 0.1
            assert (logits - other[at, -answer:]).abs().max() > 0.1


def test_a_row_does_not_see_its_padding(personal: Any, encoded: list[EncodedExample], batch: Batch) -> None:
    personal.fill()
    with torch.no_grad():
        before = personal.model.answer_logits(batch, personal.rows([0, 1, 2, 3]))
        ids = torch.where(batch.attention_mask.bool(), batch.input_ids, torch.tensor(777))
        noisy = Batch(batch.users, ids, batch.attention_mask, batch.position_ids, batch.labels)
        after = personal.model.answer_logits(noisy, personal.rows([0, 1, 2, 3]))
    for at, row in enumerate(encoded):
        answer = len(row.ids) - row.start
        torch.testing.assert_close(before[at, -answer:], after[at, -answer:], **CLOSE)


def test_one_expert_and_an_adapter_are_two_merged_loras(personal: Any, folder: Path, personalize: Any) -> None:
    """With one expert the gate is 1: the model is the backbone with W + s_g B_g A_g + s_u B_u A_u."""
    personal = personalize(load_backbone(str(folder), torch.float32, CPU), experts=1)
    personal.fill()
    merged = AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager")
    for name, layer in personal.model.layers.items():
        experts, bank = layer.experts, personal.bank
        delta = experts.scale * experts.up @ experts.down + bank.scale * bank.up[name][2] @ bank.down[name][2]
        module = merged.get_submodule(name)
        module.weight.data += delta.T if isinstance(module, Conv1D) else delta
    ids = torch.randint(3, 8000, (2, 12), generator=torch.Generator().manual_seed(0))
    with torch.no_grad(), personal.model.routing.use(personal.rows([2, 2])):
        torch.testing.assert_close(personal.backbone.model(ids).logits, merged(ids).logits, rtol=0, atol=5e-4)


def test_a_checkpoints_own_habits_do_not_decide_what_is_said(
    personal: Any, personalize: Any, folder: Path, encoded: list[EncodedExample], tmp_path: Path
) -> None:
    """Qwen's files ask for a repetition penalty; greedy decoding takes the likeliest token all the same."""
    shutil.copytree(folder, tmp_path / "habits")
    path = tmp_path / "habits" / "generation_config.json"
    habits = {"repetition_penalty": 50.0, "do_sample": True, "temperature": 5.0, "top_k": 50, "eos_token_id": [2, 7]}
    path.write_text(json.dumps(json.loads(path.read_text()) | habits))
    prompts, answers = [row.ids[: row.start] for row in encoded], []
    for either in (personal, personalize(load_backbone(str(tmp_path / "habits"), torch.float32, CPU))):
        either.fill()
        rows = either.rows([0, 1, 2, 3])
        answers.append(decoding.theirs(either.model, prompts, rows, Sampling(6)))
        answers.append(decoding.ours(either.model, prompts, rows, 6))
    assert all(answer == answers[0] for answer in answers)


def _gradients(personal: Any, batch: Batch, checkpointing: bool) -> dict[str, Tensor]:
    parameters = {**personal.model.group_parameters(), **personal.model.router_parameters()}
    for parameter in parameters.values():
        parameter.grad = None
        parameter.requires_grad_(True)
    personal.bank.gradients.zero_()
    embedding = personal.embeddings.clone().requires_grad_()
    rows = RowContext("users", embedding=embedding, slots=torch.tensor([0, 1, 2, -1]))
    with gradient_checkpointing(personal.backbone.model, checkpointing):
        total, tokens = answer_loss(personal.model.answer_logits(batch, rows), batch.labels)
        (total.sum() / tokens.sum()).backward()
    found = {name: parameter.grad for name, parameter in parameters.items()}
    return {**found, "bank": personal.bank.gradients.clone(), "embedding": embedding.grad}


def test_the_upper_layers_start_from_cached_states(
    backbone: Backbone, encoded: list[EncodedExample], tmp_path: Path
) -> None:
    model = ProperModel(backbone)
    config = GroupsConfig(layers=1, experts=3, rank=2, user_embedding=8, dropout=0.0, target_modules="all")
    model.add_experts(config, seed=0)
    generator = torch.Generator().manual_seed(0)
    for parameter in model.group_parameters().values():
        parameter.data.copy_(0.3 * torch.randn(parameter.shape, generator=generator))
    embedding = torch.randn(4, 8, generator=generator)

    def step(rows: list[int]) -> list[Tensor]:
        for parameter in model.group_parameters().values():
            parameter.requires_grad_().grad = None
        batch = collate([encoded[at] for at in rows], pad=0)
        logits = model.answer_logits(batch, RowContext("groups", embedding=embedding[rows]))
        losses, _ = answer_loss(logits, batch.labels)
        losses.sum().backward()  # type: ignore[no-untyped-call]
        return [losses.detach(), *(p.grad for p in model.group_parameters().values() if p.grad is not None)]

    batches = ([0, 1, 2], [3, 1], [2, 0, 3])
    whole = [step(rows) for rows in batches]
    lower = backbone.model.get_submodule(decoder_layers(backbone.model)[0])[0]  # type: ignore[index]
    calls: list[int] = []
    attention = next(module for name, module in lower.named_modules() if name in {"attn", "attention", "self_attn"})
    attention.register_forward_pre_hook(lambda _, __: calls.append(1))
    with model.caching(tmp_path, 1):
        calls.clear()
        for rows, expected in zip(batches, whole, strict=True):
            for found, tensor in zip(step(rows), expected, strict=True):
                torch.testing.assert_close(found, tensor, rtol=1e-4, atol=1e-4)
    assert len(calls) == 4, "once per text"


def test_gradients_reach_all_that_is_trained(personal: Any, batch: Batch) -> None:
    personal.fill()
    before = _dropout_rates(personal.backbone.model)
    plain = _gradients(personal, batch, checkpointing=False)
    for name, gradient in plain.items():
        assert gradient is not None and torch.isfinite(gradient).all() and gradient.abs().max() > 0, name
    assert all(plain["bank"][slot].abs().max() > 0 for slot in (0, 1, 2)) and not plain["bank"][3].any()
    assert all(p.grad is None for n, p in personal.backbone.model.named_parameters() if _is_the_backbones(n))
    again = _gradients(personal, batch, checkpointing=True)
    for name, gradient in plain.items():
        torch.testing.assert_close(again[name], gradient, rtol=1e-3, atol=1e-6, msg=lambda text, n=name: f"{n}: {text}")
    assert not any(module.training for module in personal.backbone.model.modules() if _is_the_backbones_module(module))
    assert _dropout_rates(personal.backbone.model) == before


def _dropout_rates(model: nn.Module) -> list[tuple[str, str, float]]:
    return [(n, k, v) for n, m in model.named_modules() for k, v in vars(m).items() if "drop" in k and v is not None]


def _is_the_backbones(name: str) -> bool:
    return not any(part in name for part in (".experts.", ".router.", ".lora_router."))


def _is_the_backbones_module(module: nn.Module) -> bool:
    return not isinstance(module, AdaptedLinear) and "proper" not in type(module).__module__


def test_greedy_decoding_equals_full_recomputation(personal: Any, encoded: list[EncodedExample]) -> None:
    personal.fill()
    users, steps = [0, 3, 1, 2], 6
    prompts = [row.ids[: row.start] for row in encoded]
    together = decoding.ours(personal.model, prompts, personal.rows(users), steps)
    for prompt, user, answer in zip(prompts, users, together, strict=True):
        ids, expected = list(prompt), []
        while len(expected) < steps:
            with torch.no_grad(), personal.model.routing.use(personal.rows([user])):
                token = int(personal.backbone.model(torch.tensor([ids]), use_cache=False).logits[0, -1].argmax())
            expected.append(token)
            ids.append(token)
        assert answer == expected
    assert len({tuple(answer) for answer in together}) == len(together)


def test_a_prompt_that_goes_on_from_a_prefix_is_the_whole_prompt(personal: Any, encoded: list[EncodedExample]) -> None:
    """Windows reach from the rest into the prefix."""
    personal.fill()
    prompts, rows = [row.ids for row in encoded], personal.rows([0, 3, 1, 2])
    shares = [len(row.ids) - 4 - at for at, row in enumerate(encoded)]
    with torch.no_grad():
        whole = RowCache(4, 40)
        expected = prefill(personal.model, whole, prompts, rows)
        prefixes = [
            CachedPrefix(tuple(ids[:share]), tuple((keys[:, :share], values[:, :share]) for keys, values in states))
            for ids, share, states in zip(prompts, shares, map(whole.states, range(4)), strict=True)
        ]
        found = prefill(personal.model, RowCache(4, 40), prompts, rows, prefixes)
    torch.testing.assert_close(found, expected, **CLOSE)


def test_scores_equal_a_full_forward_of_every_label(personal: Any, encoded: list[EncodedExample]) -> None:
    personal.fill()
    users, labels = [0, 3, 1, 2], [(40, 41, 42, 2), (50, 2), (60, 61, 2)]
    prompts = [row.ids[: row.start] for row in encoded]
    scores = score_labels(personal.model, prompts, labels, personal.rows(users))
    for at, (prompt, user) in enumerate(zip(prompts, users, strict=True)):
        for number, label in enumerate(labels):
            ids = torch.tensor([[*prompt, *label]])
            with torch.no_grad(), personal.model.routing.use(personal.rows([user])):
                logs = personal.backbone.model(ids, use_cache=False).logits[0].log_softmax(-1)
            expected = sum(float(logs[len(prompt) - 1 + step, token]) for step, token in enumerate(label))
            assert float(scores[at, number]) == pytest.approx(expected, abs=1e-3)


def test_a_backbone_without_a_padding_token_works(
    personal: Any, personalize: Any, folder: Path, encoded: list[EncodedExample], tmp_path: Path
) -> None:
    bare = tmp_path / "bare"
    shutil.copytree(folder, bare)
    for file in ("config.json", "generation_config.json", "tokenizer_config.json"):
        path = bare / file
        path.write_text(json.dumps(json.loads(path.read_text()) | {"pad_token_id": None, "pad_token": None}))
    backbone = load_backbone(str(bare), torch.float32, CPU)
    assert backbone.tokenizer.pad_token_id is None and backbone.pad_id == 2
    unpadded = personalize(backbone)
    prompts = [row.ids[: row.start] for row in encoded]
    answers = []
    for either in (personal, unpadded):
        either.fill()
        rows = either.rows([0, 1, 2, 3])
        answers.append(decoding.ours(either.model, prompts, rows, 3))
    assert answers[0] == answers[1]
    batches = [collate(encoded, pad=either.backbone.pad_id) for either in (personal, unpadded)]
    with torch.no_grad():
        logits = [
            either.model.answer_logits(batch, either.rows([0, 1, 2, 3]))
            for either, batch in zip((personal, unpadded), batches, strict=True)
        ]
    for at, row in enumerate(encoded):
        answer = len(row.ids) - row.start
        torch.testing.assert_close(logits[0][at, -answer:], logits[1][at, -answer:], **CLOSE)
