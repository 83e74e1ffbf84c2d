"""OPPU's training of users, as a baseline: user by user, a fresh PEFT LoRA and a `transformers` Trainer.

Faster than OPPU's own loop wherever there is a choice: the LoRA is in bf16, nothing is logged, evaluated or saved.
"""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor
from torch.utils.data import Dataset
from transformers import PreTrainedModel, PrinterCallback, Trainer, TrainingArguments

from proper.config import UsersConfig
from proper.data.batching import IGNORED
from proper.data.encoder import EncodedExample
from proper.models.targets import find_targets
from proper.training.jobs import Job


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
