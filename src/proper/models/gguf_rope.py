"""RoPE scaling of GGUF files, which transformers does not read: the model would rotate by other angles, without a word.

llama.cpp writes the scaling of Llama 3.1 and later as a tensor of divisors, that of others as metadata.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import PretrainedConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from proper.errors import ConfigError

_DIVISORS = "rope_freqs.weight"
_LLAMA3 = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}
"""What Llama 3.1, 3.2 and 3.3 have in common; the factor differs."""

_OWN = ("gpt-oss", "gemma4")
"""Architectures whose scaling transformers reads itself, or has in its defaults."""


def scale_rope(config: PretrainedConfig, path: Path) -> None:
    """Put the RoPE scaling of a GGUF file into the config that transformers made of it.

    Raises:
        ConfigError: the file has a scaling that cannot be expressed.
    """
    from gguf import GGUFReader

    reader = GGUFReader(path)
    fields = {name.partition(".")[2]: field for name, field in reader.fields.items()}
    if reader.fields["general.architecture"].contents() in _OWN:
        return
    tensors = {each.name: each for each in reader.tensors if each.name.startswith(("rope_freqs.", "rope_factors_"))}
    kind = fields["rope.scaling.type"].contents() if "rope.scaling.type" in fields else "none"
    if not tensors and kind == "none":
        return
    found: dict[str, Any] | None = None
    if [*tensors] == [_DIVISORS] and kind == "none":
        found = _llama3(config, torch.tensor(tensors[_DIVISORS].data))
    elif not tensors and kind == "linear" and "rope_theta" in config.rope_parameters:
        found = {"rope_type": "linear", "factor": float(fields["rope.scaling.factor"].contents())}
    if found is None:
        what = kind if kind != "none" else ", ".join(tensors)
        raise ConfigError(
            f"backbone: {path}: its scaling of RoPE ({what}) cannot be read from GGUF; use the model as safetensors"
        )
    config.rope_parameters = {**config.rope_parameters, **found}


def _llama3(config: PretrainedConfig, divisors: torch.Tensor) -> dict[str, Any] | None:
    """Return the parameters that give these divisors of the frequencies; None if there are none."""
    found = {"rope_type": "llama3", "factor": float(divisors.max()), **_LLAMA3}
    plain = dict(config.rope_parameters)
    try:
        config.rope_parameters = {**plain, **found}
        scaled, _ = ROPE_INIT_FUNCTIONS["llama3"](config, torch.device("cpu"))
    finally:
        config.rope_parameters = plain
    steps = torch.arange(len(divisors)) / len(divisors)
    wanted = plain["rope_theta"] ** -steps / divisors
    same = scaled.shape == wanted.shape and torch.allclose(scaled, wanted, rtol=1e-3, atol=0)
    return found if same else None
