"""The likelihood of fixed labels after a prompt, with the prompt computed once for all labels.

    log p(label | prompt) = sum of the log-probabilities of its tokens and of the end token

Knows nothing about users: `rows` says what the layers need.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor
from transformers import DynamicCache

from proper.inference.generate import pad_left
from proper.layers.routing import Rows
from proper.models.personal import ProperModel


def score_labels(
    model: ProperModel, prompts: Sequence[Sequence[int]], labels: Sequence[Sequence[int]], rows: Rows
) -> Float[Tensor, "B L"]:
    """Return log-likelihoods (nats, fp32) of every label's tokens after every prompt."""
    device = model.device
    ids, mask = pad_left(prompts, model.backbone.pad_id, device)
    longest = max(len(label) for label in labels)
    tokens = torch.full((len(labels), longest), model.backbone.pad_id, device=device)
    real = torch.zeros((len(labels), longest), dtype=torch.bool, device=device)
    for at, label in enumerate(labels):
        tokens[at, : len(label)] = torch.tensor(label, device=device)
        real[at, : len(label)] = True
    cache = DynamicCache(config=model.backbone.model.config)
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    with torch.no_grad():
        with model.routing.use(rows):
            first = model.backbone.model(
                input_ids=ids,
                attention_mask=mask,
                position_ids=positions,
                past_key_values=cache,
                use_cache=True,
                logits_to_keep=1,
            ).logits[:, -1]
        starts: Tensor = first.float().log_softmax(-1)[:, tokens[:, 0]]
        if longest == 1:
            return starts
        return starts + _continue(model, cache, mask, positions, tokens, real, rows)


def _continue(
    model: ProperModel, cache: DynamicCache, mask: Tensor, positions: Tensor, tokens: Tensor, real: Tensor, rows: Rows
) -> Float[Tensor, "B L"]:
    """Log-likelihood of the labels' tokens after their first, on the prompt's cache."""
    prompts, (labels, longest) = mask.shape[0], tokens.shape
    cache.batch_repeat_interleave(labels)
    inputs = tokens[:, :-1].repeat(prompts, 1)
    seen = torch.cat([mask.repeat_interleave(labels, 0), real[:, :-1].repeat(prompts, 1).to(mask.dtype)], dim=1)
    after = torch.arange(1, longest, device=mask.device) + positions[:, -1:].repeat_interleave(labels, 0)
    with model.routing.use(rows.repeat(labels)):
        logits = model.backbone.model(
            input_ids=inputs, attention_mask=seen, position_ids=after, past_key_values=cache, use_cache=True
        ).logits
    likelihood = logits.float().log_softmax(-1).view(prompts, labels, longest - 1, -1)
    target = tokens[:, 1:].expand(prompts, -1, -1).unsqueeze(-1)
    found: Tensor = (likelihood.gather(-1, target).squeeze(-1) * real[:, 1:]).sum(-1)
    return found
