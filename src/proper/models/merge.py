"""Stage 1's LoRA into the backbone: merged where the weights are dense, kept beside them where they are quantized.

Knows nothing about how it was trained; the folder is PEFT's.
"""

from __future__ import annotations

from pathlib import Path
from typing import cast

from peft import PeftModel
from peft.tuners.lora import LoraLayer
from safetensors import SafetensorError
from torch import Tensor
from transformers import PreTrainedModel

from proper.errors import ProperError
from proper.models.backbone import Backbone


def apply_population(backbone: Backbone, folder: Path) -> None:
    """Give the backbone the population adapter in `folder`, in place.

    Dense weights are merged in fp32 and cast back, so that small updates are rounded once. A quantized backbone keeps
    the LoRA frozen beside its weights; adapted layers then call both.

    Raises:
        ProperError: the adapter cannot be read.
    """
    try:
        wrapped = PeftModel.from_pretrained(backbone.model, str(folder))
    except (SafetensorError, OSError, ValueError, TypeError, KeyError) as error:
        raise ProperError(f"{folder}: not readable as a PEFT adapter: {error}") from error
    absorb(backbone, wrapped)


def absorb(backbone: Backbone, wrapped: PeftModel) -> None:
    """Merge a PEFT model's active LoRA into the backbone it wraps (or leave it beside quantized weights)."""
    wrapped.requires_grad_(False)
    wrapped.eval()
    if backbone.quantized:
        backbone.model = cast(PreTrainedModel, wrapped.get_base_model())
        return
    for module in wrapped.modules():
        if isinstance(module, LoraLayer):
            weight = cast(Tensor, module.get_base_layer().weight)
            dtype = weight.dtype
            weight.data = weight.data.float()
            module.merge()
            weight.data = weight.data.to(dtype)
    backbone.model = wrapped.unload()
