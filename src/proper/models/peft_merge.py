"""Loading of stage 1's PEFT LoRA into the backbone: merged into dense weights, kept unmerged beside quantized ones.

`recipes/stage1_population.py` trains such a LoRA in a short loop.
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
    """Apply the population adapter in `folder` to the backbone, in place.

    Dense weights are merged in fp32 and cast back, so that small updates are rounded only once. A quantized backbone
    keeps the frozen LoRA beside its weights, and adapted layers call both.

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
    """Make PEFT adapt exactly the named modules inside the block, by hiding the model type.

    For mixture-of-experts model types, PEFT takes `gate_proj`, even that of a shared expert, as the former name of the
    fused experts, and would adapt all of those instead.
    """
    config: Any = model.config
    kind = config.model_type
    config.model_type = "named"
    try:
        yield
    finally:
        config.model_type = kind


def absorb(backbone: Backbone, wrapped: PeftModel) -> None:
    """Merge a PEFT model's active LoRA into the backbone that it wraps, or keep it beside quantized weights."""
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
