"""Dropout with cheap random numbers on a CPU: eight mask values per 64-bit draw.

For masks that must not depend on the other rows of the batch, see `dropout_mask` in `layers/personalized_linear.py`.
"""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor, nn


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
