"""A tiny random Llama of all stages, and a slow model of one user written straight from the equations."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from proper.config import GroupsConfig, UsersConfig
from proper.inference import PersonalizedModel, load
from proper.layers.bank import AdapterBank
from proper.models.backbone import Backbone
from proper.models.personal import ProperModel
from tests.models.conftest import randomize


@pytest.fixture(scope="session")
def personal(backbone: Callable[..., Backbone]) -> Callable[..., ProperModel]:
    """Build a model of all stages with random experts, routers and adapters of three users."""

    def build(dtype: torch.dtype = torch.float32, router: str = "residual", **groups: Any) -> ProperModel:
        model = ProperModel(backbone(dtype))
        users = UsersConfig.model_validate({"router": router})
        model.add_experts(GroupsConfig(**{"user_embedding": 16, **groups}), seed=0)
        model.add_lora_router(users)
        randomize(model, AdapterBank(model.user_layout(users), 3, alpha=users.alpha, trainable=False))
        return model

    return build


@pytest.fixture(scope="module")
def shared(tiny_run: Path) -> Iterator[PersonalizedModel]:
    """A model for one engine after the other."""
    model = load(tiny_run)
    yield model
    model.close()


@pytest.fixture
def copied(tiny_run: Path, tmp_path: Path) -> Iterator[PersonalizedModel]:
    """The model of a copy of the run, whose store may be changed."""
    model = load(shutil.copytree(tiny_run, tmp_path / "run"))
    yield model
    model.close()


class OneUser(nn.Module):
    """y = W x + s_g sum_i b_i B_i A_i x + s_u B_u A_u x, expert by expert, for one user."""

    def __init__(self, base: nn.Module, group: dict[str, Tensor], own: dict[str, Tensor], settings: dict[str, Any]):
        super().__init__()
        self.base, self.group, self.own, self.settings = base, group, own, settings

    def forward(self, x: Tensor) -> Tensor:
        group, own, settings = self.group, self.own, self.settings
        y: Tensor = self.base(x)
        scores = x.float() @ group["token"].T + group["user"] @ settings["embedding"]
        h = None
        if own and settings["mode"] != "groups":
            h = settings["user_scale"] * ((x @ own["down"].to(x.dtype).T) @ own["up"].to(x.dtype).T)
            if settings["mode"] == "users" and "router" in own:
                by_user = h.float() @ own["router"].T
                scores = scores + by_user if settings["residual"] else by_user
        gates = scores.softmax(-1)
        experts = gates.shape[-1]
        for down, up, gate in zip(
            group["down"].chunk(experts), group["up"].chunk(experts, dim=1), gates.unbind(-1), strict=True
        ):
            part = (x @ down.to(x.dtype).T) @ up.to(x.dtype).T
            y = y + settings["group_scale"] * gate.unsqueeze(-1).to(x.dtype) * part
        return y if h is None else y + h


@pytest.fixture(scope="session")
def reference(backbone: Callable[..., Backbone]) -> Callable[..., PreTrainedModel]:
    """Build the slow model of one user from the tensors of a fast one."""

    def build(model: ProperModel, embedding: Tensor, slot: int, mode: str = "users") -> PreTrainedModel:
        slow = backbone(model.backbone.model.dtype).model
        parameters, routers = model.group_parameters(), model.router_parameters()
        for name, layer in model.layers.items():
            assert layer.bank is not None and layer.experts is not None
            group = {key: parameters[f"{name}.{key}"].detach() for key in ("down", "up", "token", "user")}
            own: dict[str, Tensor] = {}
            if slot >= 0:
                own = {"down": layer.bank.down[name][slot].detach(), "up": layer.bank.up[name][slot].detach()}
                own |= {"router": routers[name].detach()} if name in routers else {}
            settings = {
                "embedding": embedding,
                "mode": mode,
                "residual": layer.residual,
                "user_scale": layer.bank.scale,
                "group_scale": layer.experts.scale,
            }
            parent, _, leaf = name.rpartition(".")
            setattr(slow.get_submodule(parent), leaf, OneUser(slow.get_submodule(name), group, own, settings))
        return slow

    return build
