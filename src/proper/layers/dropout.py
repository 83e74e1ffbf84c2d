"""Dropout for training: a fast form for shared layers, and masks per row for user adapters."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor, nn

from proper.layers.batch_context import RowContext


def dropout(x: Float[Tensor, "*N"], rate: float) -> Float[Tensor, "*N"]:
    """Zero a share `rate` of the values, rounded to 1/256, and scale the rest so that the mean is kept.

    One 64-bit draw serves eight values: one Bernoulli draw per value took a quarter of a training step of stage 2 on a
    CPU, and half of a step of stage 1.
    """
    dropped = max(1, round(rate * 256))
    words = torch.randint(-(2**63), 2**63 - 1, ((x.numel() + 7) // 8,), dtype=torch.int64, device=x.device)
    kept = words.view(torch.uint8)[: x.numel()].view(x.shape) >= dropped
    return x * kept.to(x.dtype) * (256 / (256 - dropped))


class Dropout(nn.Module):
    """Module form of `dropout`, active in training mode only."""

    def __init__(self, rate: float) -> None:
        super().__init__()
        self.rate = rate

    def forward(self, x: Float[Tensor, "*N"]) -> Float[Tensor, "*N"]:
        """Return `x`, with dropout in training mode."""
        return dropout(x, self.rate) if self.training and self.rate > 0 else x


def dropout_mask(x: Float[Tensor, "B T I"], rate: float, rows: RowContext) -> Float[Tensor, "B T I"]:
    """Draw each row's dropout mask from the row's own generator, so that it does not depend on the other rows.

    Only the row's own tokens (`rows.mask`, right-aligned) use random numbers: padding must not shift the stream.
    """
    assert rows.generators is not None and rows.mask is not None
    keep = torch.ones_like(x)
    for row, (generator, tokens) in enumerate(zip(rows.generators, rows.mask.sum(1).tolist(), strict=True)):
        draw = torch.rand(tokens, x.shape[-1], generator=generator) >= rate
        keep[row, x.shape[1] - tokens :] = draw.to(x.dtype) / (1 - rate)
    return keep
