"""Loading a frozen causal language model and its tokenizer: an id, a folder, or the embedded `proper-nano`.

Knows nothing about what is added to it later.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from proper.errors import ConfigError

EMBEDDED = "proper-nano"


@dataclass
class Backbone:
    """A causal language model whose parameters are frozen, and its tokenizer.

    Attributes:
        name: as the config has it.
        digest: a hash of the model's shape and of a sample of every parameter.
    """

    name: str
    model: PreTrainedModel
    tokenizer: Any
    digest: str

    @property
    def device(self) -> torch.device:
        """Where the first parameter lies."""
        return self.model.device

    @property
    def hidden_size(self) -> int:
        """Width of the residual stream."""
        return int(self.model.config.get_text_config().hidden_size)

    @property
    def quantized(self) -> bool:
        """Whether the weights are quantized, so that nothing can be merged into them."""
        return bool(getattr(self.model, "is_quantized", False))

    @property
    def pad_id(self) -> int:
        """A token for padding; where the tokenizer has none, the end token, which the attention mask hides."""
        for token in (self.tokenizer.pad_token_id, self.tokenizer.eos_token_id):
            if token is not None:
                return int(token)
        return 0


def pick_device(wanted: str) -> torch.device:
    """Return the device for `auto` (a GPU if there is one) or for a torch device name.

    Raises:
        ConfigError: torch does not know or does not have that device.
    """
    if wanted == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(wanted)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise ConfigError(f"compute.device: {wanted!r} is not there: {str(error).splitlines()[0]}") from error
    return device


def pick_dtype(wanted: Literal["auto", "bf16", "fp32"]) -> torch.dtype:
    """Return the compute type; `auto` is bf16, which trained tensors and softmaxes never use."""
    return torch.float32 if wanted == "fp32" else torch.bfloat16


def backbone_location(name: str) -> str:
    """Return what transformers loads for a config's `backbone`."""
    return str(files("proper.models") / "nano") if name == EMBEDDED else name


def load_tokenizer(name: str) -> Any:
    """Load only the tokenizer of a backbone.

    Raises:
        ConfigError: there is none.
    """
    try:
        return AutoTokenizer.from_pretrained(backbone_location(name))
    except (OSError, ValueError) as error:
        raise ConfigError(f"backbone: no tokenizer for {name!r}: {_first_line(error)}") from error


def load_backbone(name: str, dtype: torch.dtype, device: torch.device) -> Backbone:
    """Load a backbone, frozen, in evaluation mode.

    Raises:
        ConfigError: nothing by that name can be loaded.
    """
    location = backbone_location(name)
    # torch's fused attention is made for long rows: on a CPU its backward pass costs more than the plain products.
    attention = {"attn_implementation": "eager"} if device.type == "cpu" else {}
    try:
        model = AutoModelForCausalLM.from_pretrained(location, dtype=dtype, **attention)
    except (OSError, ValueError, ImportError) as error:
        kind = "folder" if Path(name).exists() else "model"
        raise ConfigError(f"backbone: {kind} {name!r} cannot be loaded: {_first_line(error)}") from error
    if not getattr(model, "is_quantized", False):
        model = model.to(device)
    model.requires_grad_(False)
    model.eval()
    return Backbone(name, model, load_tokenizer(name), digest(model))


def digest(model: nn.Module) -> str:
    """Hash names, shapes and up to 4,096 evenly spaced values of every parameter."""
    state = hashlib.sha256()
    for name, tensor in model.named_parameters():
        flat = tensor.detach().reshape(-1)
        sample = flat[:: max(1, flat.numel() // 4096)].float().cpu()
        state.update(f"{name}{tuple(tensor.shape)}".encode())
        state.update(sample.numpy().tobytes())
    return state.hexdigest()[:16]


def _first_line(error: Exception) -> str:
    return str(error).strip().splitlines()[0][:200] if str(error).strip() else type(error).__name__
