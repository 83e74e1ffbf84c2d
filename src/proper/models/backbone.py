"""Loading of the backbone, a frozen causal LM with its tokenizer: from a model id, a folder or `proper-nano`."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import Any, Literal

import torch
from safetensors import SafetensorError
from torch import Tensor, nn
from torch.utils._python_dispatch import is_traceable_wrapper_subclass
from transformers import AutoModelForCausalLM, GenerationConfig, PreTrainedModel

from proper.config import Config
from proper.data.chat import uses_chat_template
from proper.data.encoder import Encoder
from proper.errors import ConfigError
from proper.models.gguf import require_weights
from proper.models.memory import MAX_TOKENS, tokens_at_once
from proper.models.positions import context_of, fix_rope, positions_of, require_positions
from proper.models.tokenizer import (
    EMBEDDED,
    backbone_location,
    load_tokenizer,
    named_ends,
    reason,
    settle_ends,
    what,
)

__all__ = [
    "EMBEDDED",
    "Backbone",
    "backbone_location",
    "configured_backbone",
    "digest",
    "load_backbone",
    "load_tokenizer",
    "pick_device",
    "pick_dtype",
]


@dataclass
class Backbone:
    """A frozen causal language model and its tokenizer.

    Attributes:
        name: the config's `backbone`.
        digest: hash of parameter names, shapes and a sample of every parameter's values.
        ends: token ids that end an answer.
        max_length: maximum row length in tokens that it was loaded for; None where it was loaded for any.
        chat: whether prompts use the tokenizer's chat template.
        every_turn: whether training counts every assistant's message of a conversation.
        batch_tokens: tokens, padding included, that run through the model at once; see `models.memory`.
    """

    name: str
    model: PreTrainedModel
    tokenizer: Any
    digest: str
    ends: tuple[int, ...] = ()
    max_length: int | None = None
    chat: bool = False
    batch_tokens: int = MAX_TOKENS
    every_turn: bool = False

    @property
    def device(self) -> torch.device:
        """Device of the first parameter."""
        return self.model.device

    @property
    def hidden_size(self) -> int:
        """Width of the residual stream."""
        return int(self.model.config.get_text_config().hidden_size)

    @property
    def embeddings(self) -> int:
        """Number of token embeddings; a tokenizer may have more tokens."""
        return _embeddings(self.model)

    @property
    def quantized(self) -> bool:
        """Whether the weights are quantized, so that no LoRA can be merged into them."""
        return bool(getattr(self.model, "is_quantized", False))

    @property
    def positions(self) -> int | None:
        """Maximum row length in tokens where positions are a table; None where rows may have any length."""
        return positions_of(self.model)

    @property
    def context(self) -> int | None:
        """Row length in tokens that the model was made for; None where its config does not tell."""
        return context_of(self.model)

    @property
    def pad_id(self) -> int:
        """Padding token, hidden by the attention mask: the tokenizer's pad or end token that the model has, else 0."""
        for token in (self.tokenizer.pad_token_id, self.tokenizer.eos_token_id):
            if token is not None and 0 <= token < self.embeddings:
                return int(token)
        return 0

    def encoder(self, max_length: int | None = None) -> Encoder:
        """Return the encoder from texts to this model's tokens; it rejects tokens without an embedding.

        Args:
            max_length: maximum tokens of a row; the length that the backbone was loaded for if None.
        """
        longest = self.max_length if max_length is None else max_length
        assert longest is not None, "a backbone loaded without a maximum length needs one for its encoder"
        return Encoder(
            self.tokenizer,
            longest,
            rows=self.embeddings,
            ends=self.ends,
            chat=self.chat,
            every_turn=self.every_turn,
        )


def pick_device(wanted: str) -> torch.device:
    """Return the device for `auto` (a GPU if available) or for a torch device name.

    Raises:
        ConfigError: the device name is unknown, or the device is not available.
    """
    if wanted == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(wanted)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError, ImportError) as error:
        raise ConfigError(f"compute.device: {wanted!r} is not available: {reason(error)}") from error
    if device.type == "meta":
        raise ConfigError("compute.device: 'meta' has no values")
    return device


def pick_dtype(wanted: Literal["auto", "bf16", "fp32"]) -> torch.dtype:
    """Return the compute dtype; `auto` is bf16. Trained tensors and softmaxes are never in bf16."""
    return torch.float32 if wanted == "fp32" else torch.bfloat16


def configured_backbone(config: Config, device: torch.device | None = None) -> Backbone:
    """Load the backbone of a config, on the config's device unless another is given.

    Raises:
        ConfigError: see `load_backbone` and `pick_device`; or the position table is shorter than the longest row.
    """
    place = pick_device(config.compute.device) if device is None else device
    dtype = pick_dtype(config.compute.dtype)
    trusted, longest = config.trust_remote_code, config.compute.max_length
    backbone = load_backbone(config.backbone, dtype, place, longest, trust_remote_code=trusted)
    backbone.chat = uses_chat_template(config.data.chat, backbone.tokenizer, config.backbone)
    backbone.every_turn = config.data.assistant_loss == "all"
    backbone.batch_tokens = tokens_at_once(config.compute, backbone.model)
    require_positions(backbone.model, longest, max(one.task.max_new_tokens for one in config.each_task.values()))
    return backbone


def load_backbone(
    name: str,
    dtype: torch.dtype,
    device: torch.device,
    max_length: int | None = None,
    *,
    trust_remote_code: bool = False,
) -> Backbone:
    """Load a backbone, frozen, in evaluation mode.

    Args:
        name: the config's `backbone`.
        dtype: the compute dtype.
        device: the device of the weights.
        max_length: maximum row length in tokens; a RoPE that depends on the row length is fixed for it. None leaves
            the RoPE as it is.
        trust_remote_code: run the Python code that some model families ship beside the weights, without asking.

    Raises:
        ConfigError: the model cannot be loaded, weights are missing, it has no end token, or an answer would depend on
            the length of other rows in its batch.
    """
    model = _load_model(name, dtype, device, trust_remote_code)
    if max_length is not None:
        fix_rope(model, max_length)
    model.requires_grad_(False)
    model.eval()
    embeddings = _embeddings(model)
    named = named_ends(model.config, model.generation_config, embeddings)
    # A checkpoint's generation defaults (such as Qwen's repetition penalty) would change the greedy answer.
    model.generation_config = GenerationConfig()  # type: ignore[no-untyped-call]
    tokenizer = load_tokenizer(name, trust_remote_code=trust_remote_code)
    ends = settle_ends(tokenizer, named, embeddings, name)
    return Backbone(name, model, tokenizer, digest(model), ends, max_length)


def _load_model(name: str, dtype: torch.dtype, device: torch.device, trust_remote_code: bool) -> Any:
    location = backbone_location(name)
    # torch's fused attention is made for long rows: on a CPU its backward pass costs more than eager attention.
    options: dict[str, Any] = {"attn_implementation": "eager"} if device.type == "cpu" else {}
    # Quantized weights cannot be moved later, so they are loaded directly onto their device.
    options |= {"dtype": dtype, "device_map": {"": device}, "ignore_mismatched_sizes": True}
    options["trust_remote_code"] = trust_remote_code
    try:
        loaded: Any = AutoModelForCausalLM.from_pretrained(location, output_loading_info=True, **options)
    except (OSError, ValueError, ImportError, RuntimeError, SafetensorError) as error:
        raise ConfigError(f"backbone: {what(name)} cannot be loaded: {reason(error)}") from error
    model, found = loaded
    require_weights(found, what(name))
    return model


def _embeddings(model: PreTrainedModel) -> int:
    weight: Any = model.get_input_embeddings().weight
    return int(weight.shape[0])


def digest(model: nn.Module) -> str:
    """Return a hash of names, shapes and about 4,096 evenly spaced values of every parameter."""
    state = hashlib.sha256()
    for name, parameter in model.named_parameters():
        state.update(f"{name}{tuple(parameter.shape)}".encode())
        for tensor in _plain(parameter.detach()):
            flat = tensor.reshape(-1)
            state.update(flat[:: max(1, flat.numel() // 4096)].float().cpu().numpy().tobytes())
    return state.hexdigest()[:16]


def _plain(tensor: Tensor) -> list[Tensor]:
    """Return the plain tensors that a quantized tensor consists of; a plain tensor gives itself."""
    if not is_traceable_wrapper_subclass(tensor):
        return [tensor]
    names, _ = tensor.__tensor_flatten__()
    return [plain for name in names for plain in _plain(getattr(tensor, name))]
