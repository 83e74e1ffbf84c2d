"""Logits and losses of the answers of a batch, for any backbone: no logits of other tokens are computed."""

from __future__ import annotations

from contextlib import nullcontext

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from proper.data.batching import IGNORED, Batch
from proper.layers.routers import at_least_fp32


def answer_logits(model: nn.Module, batch: Batch) -> Float[Tensor, "B A V"]:
    """Return the logits that predict the last A tokens of each row; no others are computed."""
    length, answer = batch.input_ids.shape[1], batch.labels.shape[1]
    # As indices, not as a number: with a number the LM head gets a strided view, which torch multiplies row by row with
    # copies of the whole head.
    wanted = torch.arange(length - answer - 1, length - 1, device=batch.input_ids.device)
    logits: Tensor = model(
        input_ids=batch.input_ids,
        attention_mask=batch.attention_mask,
        position_ids=batch.position_ids,
        logits_to_keep=wanted,
        use_cache=False,
    ).logits
    return logits


def answer_loss(
    logits: Float[Tensor, "B A V"], labels: Int[Tensor, "B A"]
) -> tuple[Float[Tensor, "B"], Float[Tensor, "B"]]:
    """Return each row's summed answer loss in nats (fp32) and its number of answer tokens."""
    losses = nn.functional.cross_entropy(
        at_least_fp32(logits).flatten(0, 1), labels.flatten(), ignore_index=IGNORED, reduction="none"
    ).view(labels.shape)
    return losses.sum(1), (labels != IGNORED).sum(1).to(losses.dtype)


def answer_losses(model: nn.Module, batch: Batch) -> tuple[Float[Tensor, "B"], Float[Tensor, "B"]]:
    """Return each row's summed answer loss in nats (fp32), times its weight, and its number of answer tokens.

    The LM head and the log-softmax see only tokens that the loss counts, not a rectangle as wide as the longest answer.
    """
    wanted = batch.labels != IGNORED
    head = model.get_output_embeddings()  # type: ignore[operator]
    packed: list[bool] = []

    def pack(_: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...] | None:
        if inputs[0].shape[:2] != wanted.shape:
            return None
        packed.append(True)
        return (inputs[0][wanted].unsqueeze(0), *inputs[1:])

    with head.register_forward_pre_hook(pack) if isinstance(head, nn.Module) else nullcontext():
        logits = answer_logits(model, batch)
    if not packed:
        sums, counts = answer_loss(logits, batch.labels)
        return batch.weighed(sums), counts
    losses = nn.functional.cross_entropy(at_least_fp32(logits[0]), batch.labels[wanted], reduction="none")
    # The tokens are in the rows' order, so a row's loss is the sum of a stretch: the same on every device and run.
    sums = torch.stack([stretch.sum() for stretch in losses.split(wanted.sum(1).tolist())])  # type: ignore[no-untyped-call]
    return batch.weighed(sums), wanted.sum(1).to(losses.dtype)
