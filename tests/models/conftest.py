"""A tiny random Llama with everything the method adds to it, built on the spot."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from proper.config import GroupsConfig, UsersConfig
from proper.layers.bank import AdapterBank
from proper.models.backbone import Backbone, digest, load_tokenizer
from proper.models.personal import ProperModel


@pytest.fixture(scope="session", autouse=True)
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def tiny_config() -> LlamaConfig:
    return LlamaConfig(
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=8192,
        max_position_embeddings=256,
        initializer_range=0.2,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
        attn_implementation="eager",
    )


@pytest.fixture(scope="session")
def backbone(tiny_config: LlamaConfig) -> Callable[..., Backbone]:
    """Build the backbone, the same each time."""
    tokenizer = load_tokenizer("proper-nano")

    def build(dtype: torch.dtype = torch.float32) -> Backbone:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            model = LlamaForCausalLM(tiny_config).to(dtype).eval().requires_grad_(False)
        return Backbone("tiny", model, tokenizer, digest(model))

    return build


@pytest.fixture(scope="session")
def personal(backbone: Callable[..., Backbone]) -> Callable[..., ProperModel]:
    """Build a model of all stages with random experts, routers and adapters of three users."""

    def build(dtype: torch.dtype = torch.float32, router: str = "residual", **groups: Any) -> ProperModel:
        model = ProperModel(backbone(dtype))
        users = UsersConfig.model_validate({"router": router})
        model.add_experts(GroupsConfig(**{"user_embedding": 16, **groups}), seed=0)
        model.add_lora_router(users)
        bank = AdapterBank(model.layout(users.rank), 3, alpha=users.alpha, trainable=True)
        model.use_bank(bank)
        generator = torch.Generator().manual_seed(1)
        for parameter in (*model.group_parameters().values(), *model.router_parameters().values()):
            parameter.data.copy_(0.2 * torch.randn(parameter.shape, generator=generator))
        bank.values.copy_(0.2 * torch.randn(bank.values.shape, generator=generator))
        return model

    return build
