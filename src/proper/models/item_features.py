"""Features of a user's items from the population model, without gradient through it: the input of the user encoder.

For an item with prompt x and answer y, and h_t the hidden state after the last layer (H,):

    context   mean of h_t over the prompt, and h at its last token                        (2 H)
    answer    mean of h_t over the answer's tokens, which have read prompt and answer      (H)
    surprise  sum over the answer's tokens of d log p(y_t) / d h = W_y - sum_v p_v W_v      (H)

The surprise is the part of the answer that the model did not predict, in the space of the LM head. A user's habits are
visible in it and in its product with the context, not in the texts alone. One forward pass computes all of them; the
derivative goes through the LM head only.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from jaxtyping import Float
from torch import Tensor, nn

from proper.data.batching import IGNORED, Batch, by_length, collate
from proper.data.encoder import EncodedExample
from proper.layers.batch_context import RowContext
from proper.layers.routers import at_least_fp32
from proper.models.personal import ProperModel

PARTS = ("mean", "last", "answer", "surprise")
"""Parts of an item's features, each of the backbone's hidden size."""

BATCH = 32
"""Rows of one forward pass."""
ANSWER_TOKENS = 512
"""Answer tokens whose logits are in memory at once."""


def _no_progress(items: int) -> None:
    """Show nothing; the default of `item_features`."""


def item_features(
    model: ProperModel, items: Sequence[EncodedExample], advance: Callable[[int], None] = _no_progress
) -> Float[Tensor, "N F"]:
    """Return the items' features, fp32, on the CPU; F is four times the hidden size.

    Args:
        model: the model; experts and adapters are not applied.
        items: the items, with an answer each.
        advance: called with the number of items done since its last call.
    """
    found: dict[int, Tensor] = {}
    for chunk in by_length([len(item.ids) for item in items], BATCH, model.backbone.batch_tokens):
        batch = collate([items[at] for at in chunk], model.backbone.pad_id, model.device)
        with model.routing.use(RowContext()):
            found |= dict(zip(chunk, _features(model, batch).cpu(), strict=True))
        advance(len(chunk))
    return torch.stack([found[at] for at in range(len(items))])


def _features(model: ProperModel, batch: Batch) -> Float[Tensor, "B F"]:
    with torch.no_grad():
        states = model.backbone.model.base_model(
            input_ids=batch.input_ids,
            attention_mask=batch.attention_mask,
            position_ids=batch.position_ids,
            use_cache=False,
        ).last_hidden_state
        length, answer = batch.input_ids.shape[1], batch.labels.shape[1]
        counted = torch.zeros_like(batch.attention_mask, dtype=torch.bool)
        counted[:, length - answer :] = batch.labels != IGNORED
        first = counted.int().argmax(1)
        before = batch.attention_mask.bool() & (torch.arange(length, device=first.device) < first.unsqueeze(1))
        rows = torch.arange(len(first), device=first.device)
        wide = at_least_fp32(states)
        context = torch.cat([_mean(wide, before), wide[rows, first - 1], _mean(wide, counted)], dim=1)
    surprise = _surprise(model.backbone.model, states, counted, batch)
    return torch.cat([context, surprise], dim=1)


def _mean(states: Float[Tensor, "B T H"], mask: Tensor) -> Float[Tensor, "B H"]:
    weights = mask.to(states.dtype).unsqueeze(-1)
    mean: Tensor = (states * weights).sum(1) / weights.sum(1).clamp(min=1)
    return mean


def _surprise(model: nn.Module, states: Float[Tensor, "B T H"], counted: Tensor, batch: Batch) -> Float[Tensor, "B H"]:
    """Return the derivative of each row's answer log-likelihood with respect to the states that predict it, summed."""
    head = model.get_output_embeddings()  # type: ignore[operator]
    asked = counted.roll(-1, 1)
    asked[:, -1] = False
    sums = torch.zeros(states.shape[0], states.shape[2], device=states.device)
    rows, targets = asked.nonzero()[:, 0], batch.input_ids[counted]
    for piece in torch.split(torch.arange(len(rows), device=rows.device), ANSWER_TOKENS):
        predicting = states[asked][piece].detach().requires_grad_()
        logits = at_least_fp32(head(predicting))
        likelihood = -nn.functional.cross_entropy(logits, targets[piece], reduction="sum")
        (gradient,) = torch.autograd.grad(likelihood, predicting)
        sums.index_add_(0, rows[piece], gradient.float())
    return sums
