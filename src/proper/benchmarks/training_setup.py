"""Synthetic users of the training benchmarks, and the baselines: one LoRA for all users, and OPPU's loop over users.

OPPU trains a fresh PEFT LoRA with a `transformers` Trainer for each user. Here it is faster than its own code wherever
there is a choice: the LoRA is in bf16, nothing is logged, evaluated or saved.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from torch.utils.data import Dataset
from transformers import PreTrainedModel, PrinterCallback, Trainer, TrainingArguments

from proper.config import GroupsConfig, UsersConfig
from proper.data.batching import IGNORED
from proper.data.demo import DemoSettings, demo_config, write_demo
from proper.data.encoder import EncodedExample, Encoder
from proper.models.backbone import Backbone
from proper.models.personal import ProperModel
from proper.models.targets import find_targets
from proper.training.jobs import Job

DTYPE = torch.bfloat16


@dataclass(frozen=True)
class _Row:
    user: str
    prompt: str
    target: str
    task: int = 0


def synthetic_users(encoder: Encoder, users: int, items: int) -> dict[str, tuple[EncodedExample, ...]]:
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


def personal_model(backbone: Backbone, groups: GroupsConfig, *, experts: bool) -> ProperModel:
    """Return a model with user adapters in `groups.layers`, and with frozen experts there if wanted."""
    model = ProperModel(backbone)
    if not experts:
        model.add_plain_targets(groups)
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


class _Items(Dataset[EncodedExample]):
    def __init__(self, items: Sequence[EncodedExample]) -> None:
        self.items = items

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, at: int) -> EncodedExample:
        return self.items[at]


def train_one_by_one(
    model: PreTrainedModel, jobs: Sequence[Job], config: UsersConfig, rate: float, pad: int
) -> list[dict[str, Tensor]]:
    """Train each user's LoRA on a frozen model, which is left as it was; return the adapters."""
    targets = list(find_targets(model, "ffn"))
    found = []
    with tempfile.TemporaryDirectory(prefix="proper-bench-") as folder:
        for job in jobs:
            lora = LoraConfig(
                task_type="CAUSAL_LM", r=config.rank, lora_alpha=int(config.alpha), bias="none", target_modules=targets
            )
            wrapped = get_peft_model(model, lora, autocast_adapter_dtype=False)
            arguments = _arguments(folder, config, rate, model.device.type)
            trainer = Trainer(wrapped, arguments, data_collator=_Collator(pad), train_dataset=_Items(job.items))
            # It would print every user's loss on stdout, which is reserved for the figures.
            trainer.remove_callback(PrinterCallback)
            trainer.train()
            found.append({n: p.detach().clone() for n, p in wrapped.named_parameters() if p.requires_grad})
            wrapped.unload()
            model.requires_grad_(False).train(False)
    return found


def _arguments(folder: str, config: UsersConfig, rate: float, device: str) -> TrainingArguments:
    return TrainingArguments(
        output_dir=folder,
        per_device_train_batch_size=config.batch_size,
        num_train_epochs=config.epochs,
        learning_rate=rate,
        lr_scheduler_type=config.schedule,
        warmup_steps=config.warmup,
        max_grad_norm=config.clip,
        weight_decay=config.weight_decay,
        optim="adamw_torch",
        remove_unused_columns=False,
        dataloader_pin_memory=False,
        save_strategy="no",
        logging_strategy="no",
        report_to=[],
        disable_tqdm=True,
        use_cpu=device == "cpu",
    )


class _Collator:
    """Collator that pads on the right and labels only answers."""

    def __init__(self, pad: int) -> None:
        self.pad = pad

    def __call__(self, rows: Sequence[EncodedExample]) -> dict[str, Any]:
        length = max(len(row.ids) for row in rows)
        ids = torch.full((len(rows), length), self.pad)
        mask, labels = torch.zeros_like(ids), torch.full_like(ids, IGNORED)
        for at, row in enumerate(rows):
            ids[at, : len(row.ids)] = torch.tensor(row.ids)
            mask[at, : len(row.ids)] = 1
            labels[at, row.start : len(row.ids)] = torch.tensor(row.ids[row.start :])
        return {"input_ids": ids, "attention_mask": mask, "labels": labels}
