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
from safetensors import SafetensorError
from torch import Tensor, nn
from torch.utils._python_dispatch import is_traceable_wrapper_subclass
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig, PreTrainedModel

from proper.config import Config
from proper.errors import ConfigError
from proper.models.rope import fix_rope

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
    def embeddings(self) -> int:
        """Tokens that have an embedding, from 0 on; a tokenizer may know more."""
        table: Any = self.model.get_input_embeddings()
        return int(table.weight.shape[0])

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
    except (RuntimeError, AssertionError, ImportError) as error:
        raise ConfigError(f"compute.device: {wanted!r} is not there: {_first_line(error)}") from error
    if device.type == "meta":
        raise ConfigError("compute.device: 'meta' holds no numbers")
    return device


def pick_dtype(wanted: Literal["auto", "bf16", "fp32"]) -> torch.dtype:
    """Return the compute type; `auto` is bf16, which trained tensors and softmaxes never use."""
    return torch.float32 if wanted == "fp32" else torch.bfloat16


def backbone_location(name: str) -> str:
    """Return what transformers loads for a config's `backbone`.

    Raises:
        ConfigError: it can only be a folder, and there is none.
    """
    if name == EMBEDDED:
        return str(files("proper.models") / "nano")
    # A model's id has at most one slash and begins with a letter or a number.
    if not name or not Path(name).is_dir() and (name.count("/") > 1 or not name[:1].isalnum()):
        raise ConfigError(f"backbone: there is no folder {name!r}")
    return name


def load_tokenizer(name: str) -> Any:
    """Load only the tokenizer of a backbone.

    Raises:
        ConfigError: there is none.
    """
    try:
        return AutoTokenizer.from_pretrained(backbone_location(name))
    except (OSError, ValueError) as error:
        raise ConfigError(f"backbone: {_what(name)} has no tokenizer: {_first_line(error)}") from error


def load_backbone(name: str, dtype: torch.dtype, device: torch.device, max_length: int | None = None) -> Backbone:
    """Load a backbone, frozen, in evaluation mode.

    Args:
        name: as the config has it.
        dtype: the compute type.
        device: where it goes.
        max_length: tokens of the longest row; a RoPE that depends on it is fixed for that, and left as it is if None.

    Raises:
        ConfigError: nothing by that name can be loaded, its weights are not all there, or an answer would depend on
            how long other texts in its batch are.
    """
    model = _load_model(name, dtype, device)
    if max_length is not None:
        fix_rope(model, max_length)
    model.requires_grad_(False)
    model.eval()
    # A checkpoint's own defaults (Qwen's repetition penalty, say) would change what the likeliest answer is.
    model.generation_config = GenerationConfig()  # type: ignore[no-untyped-call]
    return Backbone(name, model, load_tokenizer(name), digest(model))


def backbone_of(config: Config, device: torch.device | None = None) -> Backbone:
    """Load a run's backbone as its config wants it: every answer of a run, and all its training, is this one's.

    Raises:
        ConfigError: as from `load_backbone` and `pick_device`.
    """
    compute = config.compute
    device = pick_device(compute.device) if device is None else device
    return load_backbone(config.backbone, pick_dtype(compute.dtype), device, compute.max_length)


def _load_model(name: str, dtype: torch.dtype, device: torch.device) -> Any:
    location = backbone_location(name)
    # torch's fused attention is made for long rows: on a CPU its backward pass costs more than the plain products.
    options: dict[str, Any] = {"attn_implementation": "eager"} if device.type == "cpu" else {}
    # Quantized weights cannot be moved later, so they are made where they belong.
    options |= {"dtype": dtype, "device_map": {"": device}, "ignore_mismatched_sizes": True}
    try:
        loaded: Any = AutoModelForCausalLM.from_pretrained(location, output_loading_info=True, **options)
    except (OSError, ValueError, ImportError, RuntimeError, SafetensorError) as error:
        raise ConfigError(f"backbone: {_what(name)} cannot be loaded: {_first_line(error)}") from error
    model, found = loaded
    # transformers draws at random what a checkpoint lacks, and only mentions it.
    wrong = sorted(found["missing_keys"]) + sorted(key for key, *_ in found["mismatched_keys"])
    if wrong:
        raise ConfigError(f"backbone: {_what(name)}: {len(wrong)} weights are missing or misshapen, first {wrong[0]}")
    return model


def digest(model: nn.Module) -> str:
    """Hash names, shapes and up to 4,096 evenly spaced values of every parameter."""
    state = hashlib.sha256()
    for name, parameter in model.named_parameters():
        state.update(f"{name}{tuple(parameter.shape)}".encode())
        for tensor in _plain(parameter.detach()):
            flat = tensor.reshape(-1)
            state.update(flat[:: max(1, flat.numel() // 4096)].float().cpu().numpy().tobytes())
    return state.hexdigest()[:16]


def _plain(tensor: Tensor) -> list[Tensor]:
    """Return the ordinary tensors a quantized one is made of; an ordinary one is itself."""
    if not is_traceable_wrapper_subclass(tensor):
        return [tensor]
    names, _ = tensor.__tensor_flatten__()
    return [plain for name in names for plain in _plain(getattr(tensor, name))]


def _what(name: str) -> str:
    """Name a backbone in an error, saying whether it was taken for a folder."""
    if name == EMBEDDED:
        return repr(name)
    return f"folder {name!r}" if Path(name).is_dir() else f"{name!r}, which is no folder here,"


def _first_line(error: Exception) -> str:
    text = str(error).strip()
    return text.splitlines()[0][:200].removesuffix(" from one of: ") if text else type(error).__name__
