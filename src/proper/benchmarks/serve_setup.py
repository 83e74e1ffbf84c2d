"""Fixtures of `proper bench serve`: a backbone with experts and routers, a store of users, and the same under PEFT."""

from __future__ import annotations

import copy
import random
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor

from proper.adapters.store import AdapterStore, UserRecord
from proper.benchmarks.backbones import BenchBackbone
from proper.config import LastLayers, make_config
from proper.inference.kv_cache import SLACK
from proper.inference.model import PersonalizedModel, ServedUsers
from proper.layers.bank import AdapterBank
from proper.models.backbone import Backbone
from proper.models.personal import ProperModel
from proper.models.targets import expert_targets
from proper.run_folder import RunFolder, Tier

CROWD = 16
"""Users per slot in the open loop that measures the cliff."""


@dataclass(frozen=True)
class ServedShape:
    """Shape of the model and its users.

    Attributes:
        backbone: the model without its users.
        layers: decoder layers with experts and user adapters: all or the last so many.
        users: number of users in the store.
        rows: requests of the closed loop, and adapters of PEFT's model.
        prompt, answer: maximum prompt tokens and exact answer tokens of a request.
    """

    backbone: BenchBackbone
    layers: LastLayers
    dtype: torch.dtype
    users: int
    rows: int
    prompt: int
    answer: int


class Served:
    """One backbone, a store of its users, and the same backbone bare and under PEFT.

    Attributes:
        personal: the model with its users.
        alone: the same backbone without personalization.
        bare, peft: models for transformers' generate.
        names: user ids.
        prompts: tokenized prompts of different lengths.
    """

    def __init__(self, shape: ServedShape, backbone: Backbone, device: torch.device, folder: Path) -> None:
        self.shape, self.device = shape, device
        limit = shape.prompt + shape.answer
        self.config = make_config(
            {"data": {"path": "none"}, "compute": {"max_length": limit}, "groups": {"layers": shape.layers}}
        )
        self.bare = copy.deepcopy(backbone.model)
        self.names = [f"u{at}" for at in range(shape.users)]
        self.peft = self._peft_model()
        self.model = ProperModel(backbone)
        self.model.add_experts(self.config.groups, seed=0)
        self.model.add_lora_router(self.config.users)
        self._mixtures = {name: (layer.experts, layer.router) for name, layer in self.model.layers.items()}
        self.store = AdapterStore(RunFolder(folder).users.path)
        self.layout = self.model.user_layout(self.config.users)
        self.store.put(self._records())
        form: dict[str, Any] = {"device": device, "dtype": shape.dtype}
        bank = AdapterBank(self.layout, 1, alpha=self.config.users.alpha, trainable=False, **form)
        self.model.use_bank(bank)
        encoder = backbone.encoder(limit)
        encoder.end, encoder.ends = None, frozenset()
        served = ServedUsers(self.store, bank, torch.zeros(self.model.embedding_size))
        self.personal = PersonalizedModel(self.model, encoder, self.config, served, Tier.USERS)
        self.alone = PersonalizedModel(self.model, encoder, self.config, None, Tier.BASE)
        draw = random.Random(0)
        lengths = [draw.randint(shape.prompt // 2, shape.prompt) for _ in range(shape.rows)]
        self.prompts = [tuple(draw.randint(3, 8000) for _ in range(length)) for length in lengths]

    def close(self) -> None:
        """Close the store."""
        self.personal.close()

    def mix(self, experts: bool) -> None:
        """Add experts and routers to the layers, or remove them."""
        for name, layer in self.model.layers.items():
            layer.experts, layer.router = self._mixtures[name] if experts else (None, None)

    def memory(self, rows: int) -> dict[str, int]:
        """Return the memory in bytes by component for `rows` requests with a slot each."""
        self.mix(True)
        one = torch.empty(0, dtype=self.shape.dtype).itemsize
        config = self.bare.config
        heads = config.num_key_value_heads * (config.hidden_size // config.num_attention_heads)
        columns = self.shape.prompt + self.shape.answer + SLACK
        shared = {**self.model.group_parameters(), **self.model.router_parameters()}
        # In fp32 while decoding on a CPU, elsewhere in their stored dtype.
        gathered = self.layout.width * (4 if self.device.type == "cpu" else one)
        return {
            "backbone": _bytes(self.bare.parameters()),
            "experts_and_routers": _bytes(shared.values()),
            "adapter_of_one_user": self.layout.width * one,
            "slots": rows * self.layout.width * one,
            "gathered_adapters_of_rows": rows * gathered,
            "keys_and_values_of_rows": 2 * config.num_hidden_layers * rows * columns * heads * one,
            "peft_adapters": _bytes(p for name, p in self.peft.named_parameters() if "lora_" in name),
        }

    def _records(self) -> Iterator[UserRecord]:
        for at, name in enumerate(self.names):
            generator = torch.Generator().manual_seed(at)
            row = (0.02 * torch.randn(self.layout.width, generator=generator)).to(torch.bfloat16)
            embedding = torch.randn(self.model.embedding_size, generator=generator)
            yield UserRecord(name, Tier.USERS, embedding, self.layout.unpack(row))

    def _peft_model(self) -> Any:
        """Return a PEFT model with one LoRA per row, on the same modules and of the same rank."""
        names, users = self.names[: self.shape.rows], self.config.users
        model = copy.deepcopy(self.bare)
        targets = list(expert_targets(model, self.config.groups))
        lora = LoraConfig(r=users.rank, lora_alpha=int(users.alpha), target_modules=targets, init_lora_weights=False)
        wrapped: Any = get_peft_model(model, lora, adapter_name=names[0])
        for name in names[1:]:
            wrapped.add_adapter(name, lora)
        return wrapped.to(self.shape.dtype).eval()


def _bytes(tensors: Any) -> int:
    found: Iterator[Tensor] = iter(tensors)
    return sum(tensor.numel() * tensor.itemsize for tensor in found)
