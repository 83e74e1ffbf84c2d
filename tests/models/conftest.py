"""A tiny random Llama with everything the method adds to it, built on the spot."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from proper.config import GroupsConfig, UsersConfig
from proper.layers.bank import AdapterBank
from proper.models.backbone import Backbone
from proper.models.personal import ProperModel


def randomize(model: ProperModel, bank: AdapterBank) -> None:
    """Use a bank, and draw its adapters and all that the users share from seeded random numbers."""
    model.use_bank(bank)
    generator = torch.Generator().manual_seed(1)
    for parameter in (*model.group_parameters().values(), *model.router_parameters().values()):
        parameter.data.copy_(0.2 * torch.randn(parameter.shape, generator=generator))
    bank.values.copy_(0.2 * torch.randn(bank.values.shape, generator=generator))


@pytest.fixture(scope="session")
def personal(backbone: Callable[..., Backbone]) -> Callable[..., ProperModel]:
    """Build a model of all stages with random experts, routers and adapters of three users."""

    def build(
        dtype: torch.dtype = torch.float32, router: str = "residual", user_layers: int | str = "all", **groups: Any
    ) -> ProperModel:
        model = ProperModel(backbone(dtype))
        users = UsersConfig.model_validate({"router": router, "layers": user_layers})
        model.add_experts(GroupsConfig(**{"user_embedding": 16, **groups}), seed=0)
        model.add_lora_router(users)
        randomize(model, AdapterBank(model.user_layout(users), 3, alpha=users.alpha, trainable=True))
        return model

    return build
