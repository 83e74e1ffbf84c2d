"""Starting from cached hidden states gives what the whole model gives, and the cache is bounded and without a name."""

from __future__ import annotations

import logging
import resource
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from proper.config import GroupsConfig, UsersConfig
from proper.data.batching import collate
from proper.data.encoder import EncodedExample
from proper.layers.bank import AdapterBank
from proper.layers.batch_context import RowContext
from proper.models.answer_loss import answer_loss
from proper.models.backbone import Backbone, digest, load_tokenizer
from proper.models.gradient_checkpointing import gradient_checkpointing
from proper.models.lower_layers import HiddenStates
from proper.models.personal import ProperModel
from tests.models.conftest import randomize

CLOSE = {"rtol": 0, "atol": 1e-4}
TEXTS = st.lists(st.integers(3, 60), min_size=2, max_size=14).map(tuple)


def model_of(config: LlamaConfig, layers: int = 2, dtype: torch.dtype = torch.float32) -> ProperModel:
    """A model of four layers with random experts, routers and adapters in the last few."""
    shape = LlamaConfig(**{**config.to_dict(), "num_hidden_layers": 4, "attn_implementation": "eager"})
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        network = LlamaForCausalLM(shape).to(dtype).eval().requires_grad_(False)
    model = ProperModel(Backbone("tiny", network, load_tokenizer("proper-nano"), digest(network)))
    model.add_experts(GroupsConfig(layers=layers, user_embedding=16, dropout=0.1), seed=0)
    model.add_lora_router(UsersConfig())
    randomize(model, AdapterBank(model.user_layout(UsersConfig()), 3, alpha=8.0, trainable=True))
    return model


@pytest.fixture(scope="module")
def model(tiny_config: LlamaConfig) -> ProperModel:
    return model_of(tiny_config)


@contextmanager
def counted(model: ProperModel, layer: int = 0) -> Iterator[list[int]]:
    """Count the rows that run through a layer of the backbone, which need not have the method's layers."""
    rows: list[int] = []
    module = model.backbone.model.get_submodule(f"model.layers.{layer}.self_attn")
    handle = module.register_forward_pre_hook(
        lambda _, __, kwargs: rows.append(len(kwargs["hidden_states"])), with_kwargs=True
    )
    try:
        yield rows
    finally:
        handle.remove()


def step(model: ProperModel, texts: list[tuple[int, ...]], mode: str = "users") -> dict[str, Tensor]:
    """Each row's loss, and the gradients of everything that is trained."""
    bank = next(iter(model.layers.values())).bank
    assert bank is not None and bank.gradients is not None
    embedding = torch.randn(len(texts), 16, generator=torch.Generator().manual_seed(3)).requires_grad_()
    slots = torch.tensor([at % 4 - 1 for at in range(len(texts))])
    trained = {**model.group_parameters(), **model.router_parameters()}
    for parameter in trained.values():
        parameter.requires_grad_().grad = None
    bank.gradients.zero_()
    batch = collate([EncodedExample("u", ids, len(ids) // 2) for ids in texts], pad=0)
    model.train(True)
    torch.manual_seed(5)  # for the experts' dropout
    losses, _ = answer_loss(
        model.answer_logits(batch, RowContext(mode, embedding=embedding, slots=slots)), batch.labels
    )  # type: ignore[arg-type]
    losses.sum().backward()
    model.train(False)
    found = {name: parameter.grad for name, parameter in trained.items() if parameter.grad is not None}
    assert embedding.grad is not None
    return {"losses": losses.detach(), "embedding": embedding.grad, "bank": bank.gradients.clone(), **found}


@settings(max_examples=30)
@given(
    batches=st.lists(st.lists(TEXTS, min_size=1, max_size=5), min_size=1, max_size=3),
    mode=st.sampled_from(["groups", "fit", "users"]),
    megabytes=st.sampled_from([0, 1]),
    limit=st.sampled_from([None, 0, 3000]),
)
def test_losses_and_gradients_are_those_of_the_whole_model(
    model: ProperModel,
    tmp_path_factory: pytest.TempPathFactory,
    batches: list[list[tuple[int, ...]]],
    mode: str,
    megabytes: int,
    limit: int | None,
) -> None:
    folder = tmp_path_factory.getbasetemp()
    expected = [step(model, texts, mode) for texts in batches]
    with model.caching(folder, megabytes):
        if limit is not None and model._states is not None:
            model._states.limit = limit
        for texts, whole in zip([*batches, *batches], [*expected, *expected], strict=True):
            found = step(model, texts, mode)
            assert found.keys() == whole.keys()
            for name, tensor in whole.items():
                torch.testing.assert_close(found[name], tensor, **CLOSE, msg=name)


@settings(max_examples=20)
@given(batches=st.lists(st.lists(TEXTS, min_size=1, max_size=4), min_size=1, max_size=4))
def test_a_text_is_computed_once_and_has_the_same_bits_everywhere(
    model: ProperModel, tmp_path_factory: pytest.TempPathFactory, batches: list[list[tuple[int, ...]]]
) -> None:
    folder = tmp_path_factory.getbasetemp()
    rows = RowContext()
    seen: dict[tuple[int, ...], Tensor] = {}
    with model.caching(folder, 1), counted(model, 0) as lower, counted(model, 1) as second, counted(model, 3) as upper:
        for texts in batches:
            model.answer_logits(collate([EncodedExample("u", ids, 1) for ids in texts], pad=0), rows)
            assert model._states is not None
            for ids in texts:
                assert torch.equal(seen.setdefault(ids, model._states.read(ids)), model._states.read(ids))
    distinct = len({ids for texts in batches for ids in texts})
    assert lower == second == [1] * distinct and sum(upper) == sum(map(len, batches))
    with model.caching(folder, 1):
        for ids, states in seen.items():
            model.answer_logits(collate([EncodedExample("u", ids, 1)], pad=0), rows)
            assert model._states is not None and torch.equal(model._states.read(ids), states)


def test_in_bf16_the_cache_holds_bf16_and_a_row_alone_has_the_same_bits(
    tiny_config: LlamaConfig, tmp_path: Path
) -> None:
    model, ids = model_of(tiny_config, dtype=torch.bfloat16), tuple(range(3, 20))
    with torch.no_grad(), model.caching(tmp_path, 1):
        one = model.answer_logits(collate([EncodedExample("u", ids, 9)], pad=0), RowContext())
        assert model._states is not None and model._states.read(ids).dtype == torch.bfloat16
    batch = collate([EncodedExample("u", ids, 9)], pad=0)
    with torch.no_grad():
        assert torch.equal(model.answer_logits(batch, RowContext()), one)


def test_gradient_checkpointing_starts_from_the_states_too(model: ProperModel, tmp_path: Path) -> None:
    texts = [(5, 6, 7, 8), (9, 10), (11, 12, 13, 14, 15, 16)]
    whole = step(model, texts)
    with model.caching(tmp_path, 1), gradient_checkpointing(model.backbone.model, True):
        found = step(model, texts)
    for name, tensor in whole.items():
        torch.testing.assert_close(found[name], tensor, **CLOSE, msg=name)


def test_nothing_is_left_behind(model: ProperModel, tmp_path: Path) -> None:
    with model.caching(tmp_path, 1):
        step(model, [(3, 4, 5)])
        assert list(tmp_path.iterdir()) == [], "the file has no name"
        assert model._states is not None and model._states.used == 3 * 32 * 4
    assert model._states is None and model._lower is None
    assert not any("forward" in vars(module) for module in model.backbone.model.modules())


def test_layers_are_put_back_after_an_error(model: ProperModel, tmp_path: Path) -> None:
    plain = step(model, [(3, 4, 5)])
    with model.caching(tmp_path, 1), pytest.raises(ZeroDivisionError):
        assert model._lower is not None
        with model._lower.skipped(collate([EncodedExample("u", (6, 7, 8), 1)], pad=0)):
            raise ZeroDivisionError
    assert torch.equal(step(model, [(3, 4, 5)])["losses"], plain["losses"])


@pytest.mark.parametrize("layers", ["all", 4])
def test_without_lower_layers_nothing_is_cached(tiny_config: LlamaConfig, tmp_path: Path, layers: Any) -> None:
    model = model_of(tiny_config, layers)
    with model.caching(tmp_path, 1):
        step(model, [(3, 4, 5)])
        assert model._lower is None and model._states is not None and model._states.used == 0


def test_a_full_cache_goes_on_without(model: ProperModel, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    texts = [tuple(range(at, at + 10)) for at in range(3, 53)]
    with caplog.at_level(logging.INFO), model.caching(tmp_path, 1):
        assert model._states is not None
        model._states.limit = 20_000
        step(model, texts[:25])
        step(model, texts[25:])
        assert 20_000 - 10 * 32 * 4 < model._states.used <= 20_000
    assert sum("are full (compute.cache_mb," in line for line in caplog.messages) == 1


def test_half_of_the_free_disk_is_left(tmp_path: Path) -> None:
    states = HiddenStates(tmp_path, 1 << 60)
    assert 0 < states.limit <= shutil.disk_usage(tmp_path).total // 2
    states.close()


def test_a_full_disk_goes_on_without(model: ProperModel, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    whole = step(model, [tuple(range(3, 43)), (5, 6, 7)])
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    with caplog.at_level(logging.INFO), model.caching(tmp_path, 1):
        resource.setrlimit(resource.RLIMIT_FSIZE, (1000, hard))
        try:
            for _ in range(2):
                found = step(model, [tuple(range(3, 43)), (5, 6, 7)])
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert sum("they cannot be written" in line for line in caplog.messages) == 1
    torch.testing.assert_close(found["losses"], whole["losses"], **CLOSE)


def test_a_family_that_cannot_skip_layers_says_so(
    tiny_config: LlamaConfig, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """A model whose last layer also reads what the first one put aside."""
    model = model_of(tiny_config)
    first, last = (model.backbone.model.get_submodule(f"model.layers.{at}") for at in (0, 3))
    aside: list[Tensor] = []

    def keep(_: object, __: object, output: Tensor) -> None:
        aside[:] = [output]

    def add(_: object, __: object, output: Tensor) -> Tensor:
        return output + aside[0].mean() * torch.arange(32.0)

    first.register_forward_hook(keep)
    last.register_forward_hook(add)
    whole = step(model, [(3, 4, 5), (6, 7)])
    with caplog.at_level(logging.INFO), model.caching(tmp_path, 1):
        assert model._lower is None
        assert torch.equal(step(model, [(3, 4, 5), (6, 7)])["losses"], whole["losses"])
    assert caplog.messages == [
        "the first 2 layers of LlamaForCausalLM cannot be computed separately, and run in every pass"
    ]


def test_layers_added_while_caching_count(backbone: Callable[..., Backbone], tmp_path: Path) -> None:
    model = ProperModel(backbone())
    with model.caching(tmp_path, 1):
        assert model._lower is None
        model.add_experts(GroupsConfig(layers=1), seed=0)
        assert model._lower is not None and len(model._lower.lower) == 1
        model.add_experts(GroupsConfig(), seed=0)
        assert model._lower is None
