"""Free text for a batch of rows, each of its own user, decoded with a cache.

Knows nothing about users: `rows` says what the layers need.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Int
from torch import Tensor
from transformers import GenerationConfig

from proper.layers.routing import Rows
from proper.models.personal import ProperModel


@dataclass(frozen=True)
class Sampling:
    """How tokens are drawn; temperature 0 takes the likeliest."""

    max_new_tokens: int = 48
    temperature: float = 0.0
    top_p: float = 1.0
    seed: int = 0


def pad_left(
    prompts: Sequence[Sequence[int]], pad: int, device: torch.device
) -> tuple[Int[Tensor, "B T"], Int[Tensor, "B T"]]:
    """Return token ids and attention mask of prompts, padded on the left."""
    length = max(len(prompt) for prompt in prompts)
    ids = torch.full((len(prompts), length), pad)
    mask = torch.zeros((len(prompts), length), dtype=torch.long)
    for at, prompt in enumerate(prompts):
        ids[at, length - len(prompt) :] = torch.tensor(prompt)
        mask[at, length - len(prompt) :] = 1
    return ids.to(device), mask.to(device)


def generate(
    model: ProperModel, prompts: Sequence[Sequence[int]], rows: Rows, sampling: Sampling, end: int | None
) -> list[list[int]]:
    """Continue each prompt until its end token; returns the new tokens without it.

    Sampling draws for the whole batch from one seed; greedy rows do not depend on each other.
    """
    ids, mask = pad_left(prompts, model.backbone.pad_id, model.device)
    sampled = sampling.temperature > 0
    settings = GenerationConfig(  # type: ignore[no-untyped-call]
        max_new_tokens=sampling.max_new_tokens,
        do_sample=sampled,
        temperature=sampling.temperature if sampled else None,
        top_p=sampling.top_p if sampled else None,
        top_k=0 if sampled else None,
        pad_token_id=model.backbone.pad_id,
        eos_token_id=end,
        use_cache=True,
    )
    with torch.no_grad(), torch.random.fork_rng(devices=[]), model.routing.use(rows):
        torch.manual_seed(sampling.seed)
        output = model.backbone.model.generate(  # type: ignore[operator]
            input_ids=ids, attention_mask=mask, generation_config=settings
        )
    answers = output[:, ids.shape[1] :].tolist()
    return [answer[: answer.index(end)] if end in answer else answer for answer in answers]
