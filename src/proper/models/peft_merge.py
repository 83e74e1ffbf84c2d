"""Loading of stage 1's PEFT LoRA into the backbone: merged into dense weights, kept unmerged beside quantized ones.

`recipes/stage1_population.py` trains such a LoRA in a short loop.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

from peft import PeftModel, get_peft_model_state_dict
from peft.tuners.lora import LoraLayer
from safetensors import SafetensorError, safe_open
from torch import Tensor
from transformers import PreTrainedModel

from proper.errors import ProperError
from proper.files import hash_file
from proper.json_records import read_record
from proper.models.backbone import Backbone
from proper.run_folder import MARKER, PEFT_WEIGHTS


def apply_population(backbone: Backbone, folder: Path) -> None:
    """Apply the population adapter in `folder` to the backbone, in place.

    Dense weights are merged in fp32 and cast back, so that small updates are rounded only once. A quantized backbone
    keeps the frozen LoRA beside its weights, and adapted layers call both.

    Raises:
        ProperError: the adapter cannot be read, or is not the one that stage 1 has recorded in its marker.
    """
    weights, marker = folder / PEFT_WEIGHTS, folder / MARKER
    recorded = read_record(marker).get("sha256") if marker.exists() else None
    if recorded is not None and weights.exists() and hash_file(weights) != recorded:
        raise ProperError(f"{weights}: damaged, or not the adapter that stage 1 has trained; restore a copy of it")
    absorb(backbone, load_lora(backbone.model, folder))


def load_lora(model: PreTrainedModel, folder: Path) -> PeftModel:
    """Wrap a backbone in the PEFT adapter in `folder`.

    Raises:
        ProperError: the adapter cannot be read.
    """
    try:
        with modules_as_named(model), warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Found missing adapter keys")  # an error below
            wrapped = PeftModel.from_pretrained(model, str(folder))
        with safe_open(folder / PEFT_WEIGHTS, framework="pt") as file:
            found = set(file.keys())
    # A damaged config can raise any exception in PEFT; tensors of other shapes raise RuntimeError.
    except (SafetensorError, OSError, ValueError, TypeError, LookupError, AttributeError, RuntimeError) as error:
        raise ProperError(f"{folder}: not readable as a PEFT adapter: {error}") from error
    # PEFT leaves what the file lacks at its random start.
    lost = get_peft_model_state_dict(wrapped, save_embedding_layers=False).keys() - found
    if lost:
        raise ProperError(f"{folder / PEFT_WEIGHTS}: the tensor '{min(lost)}' is missing")
    return wrapped


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
