"""Memory of forward and backward passes: activations per token, tokens that run at once, freed memory given back.

    tokens at once = ROOM / bytes per token, at least one row, at most MAX_TOKENS on a CPU

The bytes per token are a formula, about those of stage 3. Measured, SmolLM2-135M with rows of 256 tokens needs 1.6
times as much in stage 1, whose LoRA is on all modules, and 1.3 times as much in stage 2.
"""

from __future__ import annotations

import ctypes
import os
import sys
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from proper.config import ComputeConfig

ROOM = 5 << 27
"""Bytes of activations on a CPU: 640 MiB by the formula."""

DEVICE_SHARE = 1 / 8
"""Share of a GPU's memory for activations."""

MAX_TOKENS = 4096
"""Maximum number of tokens at once on a CPU: more only cost memory."""


def tokens_at_once(config: ComputeConfig, model: PreTrainedModel) -> int:
    """Return how many tokens, padding included, run through a backbone at once (`compute.batch_tokens`)."""
    if config.batch_tokens != "auto":
        return config.batch_tokens
    per_token = token_bytes(model.config.get_text_config(), model.dtype.itemsize, config.max_length)
    on_cpu = model.device.type == "cpu"
    room = ROOM if on_cpu else int(device_memory(model.device) * DEVICE_SHARE)
    fitting = max(config.max_length, room // per_token)
    return min(fitting, max(MAX_TOKENS, config.max_length)) if on_cpu else fitting


def token_bytes(config: Any, compute: int, longest: int) -> int:
    """Return the bytes of activations per token until the backward pass, in a row of `longest` tokens.

    In the compute type (`compute` bytes per number), about 10 vectors of the hidden size and 5 of the inner size per
    layer, and for each head the probabilities of `longest` tokens, once more in fp32; and three rows of logits in fp32
    for the share of answer tokens, assumed to be a quarter. `config` is the text model's.
    """
    hidden, heads = int(config.hidden_size), int(config.num_attention_heads)
    inner = int(getattr(config, "intermediate_size", None) or 4 * hidden)
    block = compute * (10 * hidden + 5 * inner) + heads * longest * (compute + 4)
    return int(config.num_hidden_layers) * block + 3 * 4 * int(config.vocab_size) // 4


def device_memory(device: torch.device) -> int:
    """Return the total memory of a device in bytes; for a CPU, that of the machine or of the process's container."""
    if device.type == "cuda":
        return int(torch.cuda.get_device_properties(device).total_memory)
    physical = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    limit = Path("/sys/fs/cgroup/memory.max")
    text = limit.read_text().strip() if limit.is_file() else "max"
    return min(physical, int(text)) if text.isdigit() else physical


def give_back_memory() -> None:
    """Return freed memory to the system, where the C library is glibc.

    glibc keeps what a batch has freed, and batches of other sizes cannot always use it: the process would grow with its
    steps, and from stage to stage.
    """
    if sys.platform == "linux":
        trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
        if trim is not None:
            trim(0)
