"""Positions of a backbone: the length of its position table, and RoPE frequencies fixed for all row lengths.

Models with a table of positions (GPT-2, OPT) have a maximum length: a token beyond the table's end is an index error in
the middle of an answer.

RoPE has no maximum, but two of its types depend on the longest row of a batch:

    longrope    one of two sets of frequencies: whether the longest row exceeds the pretraining length decides
    dynamic     NTK: frequencies scaled by the length of the longest row

transformers chooses them in each forward pass, so that a row's answer would depend on the other rows of its batch. Here
they are fixed to those of the longest possible row (`compute.max_length`), in training, scoring and serving alike.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from proper.errors import ConfigError

_SPARE = 8
"""Maximum extra rows of a table before its first position (OPT: 2)."""
_TABLE = "embed_positions"  # buffer with sinusoidal positions (GPT-J, CodeGen)

MOVING = ("longrope", "dynamic")
"""The values of `rope_type` whose frequencies depend on the longest row."""

FIXED = "fixed"
"""A `rope_type` that transformers does not know, so that it leaves the frequencies unchanged."""

_PROBE = 8  # positions of the short row that a long one is compared with


def positions_of(model: nn.Module) -> int | None:
    """Return the number of positions in a model's table; None without a table, where rows may have any length."""
    most = context_of(model)
    if most is None:
        return None
    tokens = model.get_input_embeddings()  # type: ignore[operator]
    tables = [each.weight for each in model.modules() if isinstance(each, nn.Embedding) and each is not tokens]
    tables += [buffer for name, buffer in model.named_buffers() if name.rpartition(".")[2] == _TABLE]
    return most if any(_is_table(table, most) for table in tables) else None


def context_of(model: nn.Module) -> int | None:
    """Return the row length in tokens that a model was made for; None where its config does not tell."""
    config: Any = model.config
    most: int | None = getattr(config.get_text_config(), "max_position_embeddings", None)
    return most


def require_positions(model: nn.Module, length: int, answer: int) -> None:
    """Check that a model can have rows of `length` tokens, and answers of `answer` tokens to the longest prompts.

    Without a table, `length` is the caller's choice. Only an answer that is longer has to fit into the context, since
    the memory for it is allocated at once.

    Raises:
        ConfigError: the position table or the context is shorter; the message names both lengths.
    """
    # A prompt always keeps half of `max_length`, however long its answer may be; see `Encoder.prompt`.
    rows, most, context = max(length, length // 2 + answer), positions_of(model), context_of(model)
    if most is not None and rows > most:
        key = "it" if length > most else "task.max_new_tokens"
        raise ConfigError(
            f"compute.max_length: rows may have {rows} tokens, but the backbone has {most} positions; lower {key}"
        )
    if context is not None and answer > max(length, context):
        raise ConfigError(
            f"task.max_new_tokens: an answer of {answer} tokens does not fit into the backbone's context of {context}"
        )


def _is_table(weight: Tensor, most: int) -> bool:
    return weight.ndim == 2 and most <= weight.shape[0] <= most + _SPARE


def fix_rope(model: nn.Module, length: int) -> None:
    """Fix the frequencies of all rotary embeddings of a model to those for rows of `length` tokens.

    Raises:
        ConfigError: a rotary embedding depends on the longest row in a way of its own, so that it cannot be fixed.
    """
    wanted = _moving_types(model)
    for module in model.modules():
        kinds: Any = getattr(module, "rope_type", None)
        by_layer = kinds if isinstance(kinds, dict) else {None: kinds}
        moving = {layer: kind for layer, kind in by_layer.items() if kind in MOVING}
        if not moving:
            continue
        for layer, kind in moving.items():
            _fix(module, kind, layer, length)
        module.rope_type = kinds | dict.fromkeys(moving, FIXED) if isinstance(kinds, dict) else FIXED  # type: ignore
        for layer, kind in moving.items():
            _require_fixed(module, kind, layer, length)
        wanted -= set(moving.values())
    if wanted:
        raise ConfigError(_refusal(", ".join(sorted(wanted))))


def _fix(module: Any, kind: str, layer: str | None, length: int) -> None:
    prefix = "" if layer is None else f"{layer}_"
    config = module.config
    settings = config.rope_parameters if layer is None else config.rope_parameters[layer]
    # Up to this length the module keeps its initial frequencies, by whatever rule it has computed them.
    first = settings["original_max_position_embeddings"] if kind == "longrope" else config.max_position_embeddings
    if length <= first:
        return
    frequencies: Tensor = getattr(module, f"{prefix}inv_freq")
    fixed, scaling = ROPE_INIT_FUNCTIONS[kind](config, frequencies.device, seq_len=length, layer_type=layer)
    frequencies.copy_(fixed)
    setattr(module, f"{prefix}attention_scaling", scaling)


def _require_fixed(module: Any, kind: str, layer: str | None, length: int) -> None:
    """Check that the angles of the first positions do not depend on the row's length."""
    layers = () if layer is None else (layer,)
    device = next(buffer.device for buffer in module.buffers())
    x = torch.zeros(1, 1, device=device)
    few, every = (torch.arange(size, device=device)[None] for size in (min(_PROBE, length), length))
    try:
        same = all(
            torch.equal(before, after[:, : before.shape[1]])
            for before, after in zip(module(x, few, *layers), module(x, every, *layers), strict=True)
        )
    except (RuntimeError, ValueError, TypeError, IndexError) as error:  # a family with another form of positions
        raise ConfigError(_refusal(kind)) from error
    if not same:
        raise ConfigError(_refusal(kind))


def _moving_types(model: Any) -> set[str]:
    """Return the RoPE types in `MOVING` that the text model's config names, for all layers or for some."""
    parameters: Any = getattr(model.config.get_text_config(), "rope_parameters", None) or {}
    named = [parameters, *(value for value in parameters.values() if isinstance(value, dict))]
    return {str(each["rope_type"]) for each in named if each.get("rope_type") in MOVING}


def _refusal(kinds: str) -> str:
    return f"backbone: its RoPE ({kinds}) depends on the longest text of a batch, and this family's cannot be fixed"
