"""Stage 1 training: one PEFT LoRA on the data of all users, then merged into the backbone (method: stage 1).

`recipes/stage1_population.py` is the same as one flat loop.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from peft import LoraConfig, PeftModel, get_peft_model
from peft.helpers import disable_input_dtype_casting
from peft.tuners.lora import LoraLayer
from safetensors import SafetensorError
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from proper.config import PopulationConfig
from proper.data.batching import Batch
from proper.data.histories import TextExample
from proper.errors import ProperError
from proper.layers.dropout import Dropout
from proper.models.answer_loss import answer_losses
from proper.models.backbone import Backbone
from proper.models.gradient_checkpointing import gradient_checkpointing
from proper.models.peft_merge import absorb, modules_as_named
from proper.models.targets import find_targets
from proper.training.checkpoint import seed_of
from proper.training.early_stopping import EarlyStopping
from proper.training.privacy import train_privately
from proper.training.trainer import LossSum, TrainingPlan, train


class PopulationStage:
    """The `TrainableStage` of a PEFT LoRA on the backbone for the training loop."""

    name = "population"
    in_parts = True

    def __init__(self, model: PeftModel, low_precision: bool) -> None:
        self.model = model
        # PEFT keeps its LoRA in fp32; autocast runs its matrix products in the backbone's dtype.
        device = model.device.type
        self._context = torch.autocast(device, torch.bfloat16) if low_precision else nullcontext()

    def parameters(self) -> dict[str, nn.Parameter]:
        """Return the LoRA's tensors."""
        return {name: p for name, p in self.model.named_parameters() if p.requires_grad}

    def loss(self, batch: Batch, progress: float) -> LossSum:
        """Return the answer loss of a batch."""
        with self._context:
            total, tokens = answer_losses(self.model, batch)
        return LossSum(total.sum(), tokens.sum())

    def held_out_loss(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """Return the summed answer loss of a batch and its number of answer tokens, without dropout."""
        layers = [module for module in self.model.modules() if isinstance(module, LoraLayer)]
        for layer in layers:
            layer.eval()
        found = self.loss(batch, 0.0)
        for layer in layers:
            layer.train()
        return found.total, found.tokens

    def after_backward(self, rate_factor: float) -> None:
        """Do nothing: AdamW updates all parameters."""

    def state(self) -> dict[str, Tensor]:
        """Return no tensors: there is no state beyond parameters and moments."""
        return {}

    def restore(self, tensors: dict[str, Tensor]) -> None:
        """Do nothing: there is no further state to restore."""


def train_population(
    backbone: Backbone,
    config: PopulationConfig,
    plan: TrainingPlan,
    held_out: Sequence[TextExample],
    accelerator: Accelerator,
    folder: Path,
) -> None:
    """Train stage 1, write a PEFT adapter folder, and merge it into `backbone` in place.

    Args:
        backbone: the model; its weights change.
        config: hyperparameters.
        plan: the training rows and the rest of the training loop.
        held_out: rows for early stopping, not among the plan's; none for training to the end.
        accelerator: the processes.
        folder: the PEFT adapter folder.
    """
    wrapped = wrap(backbone, config, plan.seed)
    with in_training(backbone, wrapped, config) as stage:
        if plan.privacy is not None:
            train_privately(stage, plan, accelerator)
        else:
            stopping = EarlyStopping.on(held_out, config.patience, plan.encoder, plan.pad, stage.held_out_loss)
            train(stage, plan, accelerator, stopping)
    if accelerator.is_main_process:
        try:
            wrapped.save_pretrained(str(folder))
        except (OSError, SafetensorError) as error:
            raise ProperError(f"{folder}: cannot be written: {error}") from error
    absorb(backbone, wrapped)


@contextmanager
def in_training(backbone: Backbone, wrapped: PeftModel, config: PopulationConfig) -> Iterator[PopulationStage]:
    """Prepare a wrapped backbone for stage 1's forward and backward passes inside the block."""
    low_precision = backbone.model.dtype == torch.bfloat16
    # Enable only the LoRA's dropout; a backbone's own dropout would make stage 1 differ between model families.
    wrapped.eval()
    for module in wrapped.modules():
        if isinstance(module, LoraLayer):
            module.train()
    # PEFT casts every module's input to fp32 for its fp32 weights; autocast would only cast it back.
    narrow = disable_input_dtype_casting(wrapped, low_precision)
    with narrow, gradient_checkpointing(backbone.model, config.gradient_checkpointing):
        yield PopulationStage(wrapped, low_precision)


def wrap(backbone: Backbone, config: PopulationConfig, seed: int) -> PeftModel:
    """Wrap the backbone in a new PEFT LoRA initialized from `seed`."""
    targets = list(find_targets(backbone.model, config.target_modules))
    settings: dict[str, Any] = {"r": config.rank, "lora_alpha": config.alpha, "lora_dropout": config.dropout}
    # GPT-2's layers (Conv1D) store their weights transposed; PEFT needs this flag for them.
    settings["fan_in_fan_out"] = any(isinstance(backbone.model.get_submodule(name), Conv1D) for name in targets)
    with torch.random.fork_rng(devices=[]), modules_as_named(backbone.model):
        torch.manual_seed(seed_of(seed, "population"))
        lora = LoraConfig(task_type="CAUSAL_LM", bias="none", target_modules=targets, **settings)
        wrapped = get_peft_model(backbone.model, lora)
    assert isinstance(wrapped, PeftModel)
    for module in wrapped.modules():
        if isinstance(module, LoraLayer) and config.dropout > 0:
            # PEFT's dropout draws one Bernoulli sample per number: half of a step's time on a CPU.
            module.lora_dropout = nn.ModuleDict({name: Dropout(config.dropout) for name in module.lora_dropout})
    return wrapped
