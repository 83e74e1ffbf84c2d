"""Backbones of the benchmarks: a named one, or a Llama of a known shape with random weights, at the same speed."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM

from proper.errors import InputError, did_you_mean
from proper.models.backbone import EMBEDDED, Backbone, digest, load_backbone, load_tokenizer

SHAPES: Mapping[str, Mapping[str, Any]] = {
    "smollm2-135m": {
        "hidden_size": 576,
        "intermediate_size": 1536,
        "num_hidden_layers": 30,
        "num_attention_heads": 9,
        "num_key_value_heads": 3,
        "vocab_size": 49152,
        "tie_word_embeddings": True,
    }
}
"""Shapes of well-known models, as settings of `LlamaConfig`."""


@dataclass(frozen=True)
class BenchBackbone:
    """The backbone of a benchmark.

    Attributes:
        name: a backbone's name, or the name of the shape.
        shape: settings of a Llama with random weights and `proper-nano`'s tokenizer; None loads the named backbone.
    """

    name: str = EMBEDDED
    shape: Mapping[str, Any] | None = None

    @classmethod
    def of(cls, backbone: str | None, shape: str | None) -> BenchBackbone:
        """Return the choice of the command line: a backbone or a shape of `SHAPES`, `proper-nano` without either.

        Raises:
            InputError: there is no such shape, or both are given.
        """
        if shape is None:
            return cls(backbone or EMBEDDED)
        if backbone is not None:
            raise InputError("--shape: is a model with random weights, so --backbone cannot be given too")
        if shape not in SHAPES:
            raise InputError(f"--shape: no shape '{shape}'; {did_you_mean(shape, list(SHAPES))}")
        return cls(shape, SHAPES[shape])

    def load(self, dtype: torch.dtype, device: torch.device) -> Backbone:
        """Return the backbone, loaded or made anew.

        Raises:
            ConfigError: it cannot be loaded.
        """
        if self.shape is None:
            return load_backbone(self.name, dtype, device)
        attention = "eager" if device.type == "cpu" else "sdpa"
        fixed = {"pad_token_id": 0, "eos_token_id": None, "attn_implementation": attention}
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            model: Any = LlamaForCausalLM(LlamaConfig(**{**self.shape, **fixed}))
        model.to(device=device, dtype=dtype).eval().requires_grad_(False)
        model.generation_config = GenerationConfig()  # type: ignore[no-untyped-call]
        return Backbone("random", model, load_tokenizer(EMBEDDED), digest(model))

    def setting(self) -> dict[str, Any]:
        """Return the entries of a benchmark's setting."""
        return {"backbone": self.name, "random_weights": self.shape is not None}
