"""Loss of the choice among labels, in one pass over the prompt followed by the tree of all labels.

    -log softmax_y(s(y | x) + prior(y))        s: the sum of the log-probabilities of y's tokens and the end token

This is the `residual` form of the user prior (method: user prior). A mask lets every token of the tree see the prompt
and the earlier tokens of its own branch, as in `inference.score`; here all is one row, with gradients.
"""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn
from transformers import PreTrainedModel

from proper.data.batching import Batch
from proper.layers.routers import at_least_fp32


def choice_losses(model: nn.Module, batch: Batch) -> tuple[Float[Tensor, "B"], Float[Tensor, "B"]]:
    """Return each row's loss in nats (fp32), and 1 for every row: a choice counts once, however long the label is."""
    device, length, width = batch.input_ids.device, batch.input_ids.shape[1], batch.labels.shape[1]
    dtype = next(model.parameters()).dtype
    sees = visible(batch)
    hidden = torch.zeros(sees.shape, dtype=dtype, device=device).masked_fill_(~sees, torch.finfo(dtype).min)
    logits: Tensor = model(
        input_ids=batch.input_ids,
        attention_mask=hidden.unsqueeze(1),
        position_ids=batch.position_ids,
        logits_to_keep=torch.arange(length - width - 1, length, device=device),
        use_cache=False,
    ).logits
    logits = at_least_fp32(logits)
    totals = logits.logsumexp(-1)
    losses = []
    for row, choice in enumerate(batch.choices):
        tree = choice.tree
        at = (width - tree.size + tree.start).to(device)
        edges = logits[row, at, tree.target.to(device)] - totals[row, at]
        scores = edges @ tree.member.to(edges) + choice.prior.to(edges)
        losses.append(scores.logsumexp(0) - scores[choice.answer])
    found = torch.stack(losses)
    return found, torch.ones_like(found)


def visible(batch: Batch) -> Bool[Tensor, "B T T"]:
    """Return whether token i of a row attends to token j: those before it, in the tree only those of its own branch."""
    size = batch.input_ids.shape[1]
    before = torch.ones(size, size, dtype=torch.bool, device=batch.input_ids.device).tril()
    sees = before & batch.attention_mask.bool()[:, None, :]
    for row, choice in enumerate(batch.choices):
        nodes = choice.tree.size
        if nodes:
            sees[row, size - nodes :, size - nodes :] = choice.tree.sees.to(sees.device)
    return sees


def takes_trees(model: PreTrainedModel, length: int) -> bool:
    """Whether the backbone accepts a 4-D attention mask, and no layer's window is shorter than `length`."""
    config = model.config.get_text_config()
    windows = (getattr(config, name, None) for name in ("sliding_window", "attention_chunk_size"))
    takes_masks = getattr(model, "_supports_attention_backend", False) and not getattr(model, "_is_stateful", False)
    return bool(takes_masks) and all(window is None or length <= window for window in windows)
