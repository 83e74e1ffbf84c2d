"""Forward passes of the engine: prefill of new rows' prompts, and decoding of one token for every running row."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from jaxtyping import Float, Int
from torch import Tensor
from transformers import DynamicCache

from proper.adapters.records import Head
from proper.data.batching import position_ids
from proper.errors import ConfigError
from proper.inference.kv_cache import RowCache
from proper.inference.model import PersonalizedModel
from proper.inference.prefix_cache import CachedPrefix
from proper.layers.batch_context import GatheredWeights, RowContext
from proper.models.personal import ProperModel
from proper.run_folder import Tier


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


def rows_of(
    model: PersonalizedModel,
    heads: Sequence[Head | None],
    slots: Sequence[int],
    uses_experts: Sequence[bool],
    trace: bool = False,
    tasks: Sequence[int] | None = None,
) -> RowContext:
    """Return the row context of a batch: embeddings, adapter slots and expert mask.

    Args:
        model: the model that will compute the batch.
        heads: the user record of each row; None gives the mean embedding.
        slots: the bank slot of each row's adapter; -1 for a row without an adapter.
        uses_experts: whether experts are applied to a row; population rows get neither experts nor adapter.
        trace: whether the gates of each row's last token are recorded.
        tasks: the number of each row's task; the first one for all if None.
    """
    if model.served is None or model.stage in (Tier.BASE, Tier.POPULATION) or not any(uses_experts):
        return RowContext()
    device = model.model.device
    mean = model.served.mean
    embedding = torch.stack([mean if head is None else head.embedding for head in heads]).to(device)
    experts = None if all(uses_experts) else torch.tensor(uses_experts, device=device)
    numbers = torch.tensor([0] * len(heads) if tasks is None else tasks, device=device)
    if max(slots) < 0:
        return RowContext("groups", embedding=embedding, experts=experts, trace=trace, tasks=numbers)
    own = torch.tensor(slots, device=device)
    # Slots are pinned while their rows run, so weights gathered from them stay valid for every step.
    rows = RowContext("users", embedding=embedding, slots=own, experts=experts, trace=trace, tasks=numbers)
    return replace(rows, gathered=GatheredWeights())


def columns_left(prompts: Sequence[Sequence[int]], prefixes: Sequence[CachedPrefix]) -> int:
    """Return how many tokens of each prompt a pass computes: the length of the longest uncached rest, for all rows.

    Prompts with a shorter rest use less of their prefix. Padding between prefix and rest would cost the same and would
    be wrong: distances between columns must be distances between tokens.
    """
    return max(len(prompt) - len(prefix.tokens) for prompt, prefix in zip(prompts, prefixes, strict=True))


def prefill(
    model: ProperModel,
    cache: RowCache,
    prompts: Sequence[Sequence[int]],
    rows: RowContext,
    prefixes: Sequence[CachedPrefix] | None = None,
) -> Float[Tensor, "B V"]:
    """Compute prompts, add their rows to the KV cache, and return the logits of each answer's first token.

    Args:
        model: the model.
        cache: the KV cache that the rows are added to.
        prompts: token ids of each prompt.
        rows: the row context of these prompts.
        prefixes: the cached prefix of each prompt; None computes the whole prompts.

    Raises:
        ConfigError: the backbone fills no KV cache (OpenAI's first GPT).
    """
    ids, mask = pad_left(prompts, model.backbone.pad_id, model.device)
    width = ids.shape[1] if prefixes is None else columns_left(prompts, prefixes)
    sizes = [len(prompt) for prompt in prompts]
    filled = DynamicCache() if prefixes is None else _filled(prefixes, sizes, width)
    # As an index, not a number: see `models.answer_loss.answer_logits`.
    last = torch.tensor([width - 1], device=model.device)
    with model.routing.use(rows):
        logits: Tensor = model.backbone.model(
            input_ids=ids[:, -width:],
            attention_mask=mask,
            position_ids=position_ids(mask)[:, -width:],
            past_key_values=filled,
            use_cache=True,
            logits_to_keep=last,
        ).logits[:, -1]
    if not filled.layers:
        family = type(model.backbone.model).__name__
        raise ConfigError(f"backbone: {model.backbone.name!r} ({family}) has no key-value cache, which answers need")
    cache.join(filled, sizes)
    return logits


def _filled(prefixes: Sequence[CachedPrefix], sizes: Sequence[int], width: int) -> DynamicCache:
    """Return the KV cache of left-padded prompts of these sizes, without their last `width` columns."""
    filled = DynamicCache()
    columns = max(sizes) - width
    for number, pair in enumerate(prefixes[0].states if columns > 0 else ()):
        sides = []
        for side, state in enumerate(pair):
            padded = state.new_zeros(len(sizes), state.shape[0], columns, state.shape[2])
            for at, (prefix, size) in enumerate(zip(prefixes, sizes, strict=True)):
                if size > width:
                    padded[at, :, columns - (size - width) :] = prefix.states[number][side][:, : size - width]
            sides.append(padded)
        filled.update(sides[0], sides[1], number)
    return filled


def decode(model: ProperModel, cache: RowCache, last: Sequence[int], rows: RowContext) -> Float[Tensor, "B V"]:
    """Compute each row's newest token, add it to the KV cache, and return the logits of the next token."""
    filled, mask, positions = cache.step()
    ids = torch.tensor(last, device=model.device)[:, None]
    with model.routing.use(rows):
        logits: Tensor = model.backbone.model(
            input_ids=ids, attention_mask=mask, position_ids=positions, past_key_values=filled, use_cache=True
        ).logits[:, -1]
    cache.advance()
    return logits
