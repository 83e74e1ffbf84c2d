"""The engine's two forward passes: prompts of new rows, and one token of every running row.

Knows nothing about who asks or waits.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor
from transformers import DynamicCache

from proper.adapters.records import Head
from proper.inference.generate import pad_left
from proper.inference.kv import RowCache
from proper.inference.personalized import PersonalizedModel
from proper.layers.routing import Kept, Rows
from proper.models.personal import ProperModel


def rows_of(
    model: PersonalizedModel,
    heads: Sequence[Head | None],
    slots: Sequence[int],
    grouped: Sequence[bool],
    trace: bool = False,
) -> Rows:
    """Return what the layers need for a batch.

    Args:
        model: whose layers.
        heads: each row's record; None for nobody's.
        slots: where each row's adapter is; -1 for a row without one.
        grouped: whether experts take part in a row; population rows take neither experts nor adapter.
        trace: whether the gates of each row's last token are kept.
    """
    if model.cache is None or model.stage in ("base", "population") or not any(grouped):
        return Rows()
    device = model.model.device
    mean = model.cache.mean
    embedding = torch.stack([mean if head is None else head.embedding for head in heads]).to(device)
    experts = None if all(grouped) else torch.tensor(grouped, device=device)
    if max(slots) < 0:
        return Rows("groups", embedding=embedding, experts=experts, trace=trace)
    own = torch.tensor(slots, device=device)
    # Rows are pinned to their slots while they run, so what is gathered from those stays right for every step.
    return Rows("users", embedding=embedding, slots=own, experts=experts, trace=trace, kept=Kept())


def prefill(model: ProperModel, cache: RowCache, prompts: Sequence[Sequence[int]], rows: Rows) -> Float[Tensor, "B V"]:
    """Compute prompts, add their rows to the cache, and return the logits of each one's first token."""
    ids, mask = pad_left(prompts, model.backbone.pad_id, model.device)
    filled = DynamicCache()
    # As an index, not a number: see `models.personal.answer_logits`.
    last = torch.tensor([ids.shape[1] - 1], device=model.device)
    with model.routing.use(rows):
        logits: Tensor = model.backbone.model(
            input_ids=ids,
            attention_mask=mask,
            position_ids=(mask.cumsum(1) - 1).clamp(min=0),
            past_key_values=filled,
            use_cache=True,
            logits_to_keep=last,
        ).logits[:, -1]
    cache.join(filled, [len(prompt) for prompt in prompts])
    return logits


def decode(model: ProperModel, cache: RowCache, last: Sequence[int], rows: Rows) -> Float[Tensor, "B V"]:
    """Compute each row's newest token, add it to the cache, and return the logits of the one after it."""
    held, mask, positions = cache.step()
    ids = torch.tensor(last, device=model.device)[:, None]
    with model.routing.use(rows):
        logits: Tensor = model.backbone.model(
            input_ids=ids, attention_mask=mask, position_ids=positions, past_key_values=held, use_cache=True
        ).logits[:, -1]
    cache.advance()
    return logits
