"""Stage 1's LoRA into the backbone: merged where the weights are dense, kept beside them where they are quantized.

Knows nothing about how it was trained; the folder is PEFT's.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

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
    absorb(backbone, load_lora(backbone.model, folder))


def load_lora(model: PreTrainedModel, folder: Path) -> PeftModel:
    """Wrap a backbone in the PEFT adapter in `folder`.

    Raises:
        ProperError: the adapter cannot be read.
    """
    try:
        with modules_as_named(model):
            return PeftModel.from_pretrained(model, str(folder))
    except (SafetensorError, OSError, ValueError, TypeError, KeyError) as error:
        raise ProperError(f"{folder}: not readable as a PEFT adapter: {error}") from error


@contextmanager
def modules_as_named(model: PreTrainedModel) -> Iterator[None]:
    """Have PEFT adapt the modules that are named, and nothing else, inside the block.

    In a mixture of experts it takes `gate_proj`, of a shared expert too, for the name that the fused experts once had,
    and adapts all of those instead. It knows such a model by its type.
    """
    config: Any = model.config
    kind = config.model_type
    config.model_type = "named"
    try:
        yield
    finally:
        config.model_type = kind


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
