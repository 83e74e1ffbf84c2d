"""Fixtures of the training benchmarks: synthetic users' tokenized interactions, and the models under comparison."""

from __future__ import annotations

import json
import tempfile
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from proper.config import GroupsConfig, UsersConfig
from proper.data.demo import DemoSettings, demo_config, write_demo
from proper.data.encoder import EncodedExample, Encoder
from proper.models.backbone import Backbone, load_backbone
from proper.models.personal import ProperModel
from proper.models.targets import find_targets
from proper.training.jobs import Job

BACKBONE = "proper-nano"
DTYPE = torch.bfloat16


@dataclass(frozen=True)
class _Row:
    user: str
    prompt: str
    target: str


def backbone(device: torch.device) -> Backbone:
    """Load the benchmark's backbone."""
    return load_backbone(BACKBONE, DTYPE, device)


def people(encoder: Encoder, users: int, items: int) -> dict[str, tuple[EncodedExample, ...]]:
    """Return tokenized synthetic interactions by user, `items` for each."""
    settings = DemoSettings(users=users, items=(items, items), groups=min(5, users))
    with tempfile.TemporaryDirectory(prefix="proper-bench-") as name:
        path = write_demo(Path(name), settings)
        prompt = demo_config(path, settings)["data"]["prompt"]
        rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    found: dict[str, list[EncodedExample]] = {}
    for row in rows:
        text = prompt.format(input=row["input"])
        found.setdefault(row["user_id"], []).append(encoder.encode(_Row(row["user_id"], text, row["output"])))
    return {user: tuple(encoded) for user, encoded in found.items()}


def make_jobs(histories: dict[str, tuple[EncodedExample, ...]], epochs: int, embedding: int) -> list[Job]:
    """Return each user's history as a job for the multi-user trainer."""
    generator = torch.Generator().manual_seed(0)
    return [
        Job(user, 0.02 * torch.randn(max(1, embedding), generator=generator), items, epochs=epochs)
        for user, items in histories.items()
    ]


def personal_model(device: torch.device, users: UsersConfig, groups: GroupsConfig | None) -> ProperModel:
    """Return a model with user adapters on its FFN modules, and with frozen experts if `groups` is given."""
    model = ProperModel(backbone(device))
    if groups is None:
        model.add_plain_targets(users, "ffn")
        return model
    model.add_experts(groups, seed=0)
    for parameter in model.group_parameters().values():
        parameter.requires_grad_(False)
    return model


class SharedLora(nn.Module):
    """A base layer with one LoRA shared by all users; fp32 weights, products in the input's dtype.

    Attributes:
        down: A (R, I), Kaiming-uniform.
        up: B (O, R), initialized to zero.
    """

    def __init__(self, base: nn.Module, inputs: int, outputs: int, rank: int, alpha: float) -> None:
        super().__init__()
        self.base, self.scale = base, alpha / rank
        self.in_features, self.out_features = inputs, outputs
        bound = inputs**-0.5
        self.down = nn.Parameter(torch.empty(rank, inputs).uniform_(-bound, bound))
        self.up = nn.Parameter(torch.zeros(outputs, rank))

    def forward(self, x: Tensor) -> Tensor:
        """Return base(x) + s B A x."""
        y: Tensor = self.base(x)
        middle = nn.functional.linear(x, self.down.to(x.dtype)) * self.scale
        return torch.addmm(y.flatten(0, -2), middle.flatten(0, -2), self.up.to(x.dtype).t()).view(y.shape)


def share_lora(model: nn.Module, rank: int, alpha: float, modules: int | None = None) -> list[nn.Parameter]:
    """Add one LoRA to every FFN module of a model, or to the first few, in place; return its parameters."""
    found: list[nn.Parameter] = []
    for name, (inputs, outputs) in list(find_targets(model, "ffn").items())[:modules]:
        layer = SharedLora(model.get_submodule(name), inputs, outputs, rank, alpha).to(next(model.parameters()).device)
        parent, _, leaf = name.rpartition(".")
        setattr(model.get_submodule(parent), leaf, layer)
        found += [layer.down, layer.up]
    return found
