"""Dropout whose random numbers are cheap on a CPU.

Knows nothing about what is dropped. Where a row's mask must not depend on the rest of the batch, see `dropout_mask` in
`layers/personalized_linear.py`.
"""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor, nn


def dropout(x: Float[Tensor, "*N"], rate: float) -> Float[Tensor, "*N"]:
    """Drop about `rate` of the numbers, in steps of 1/256, and scale the rest so that the mean stays.

    One 64-bit draw serves eight numbers: drawing one Bernoulli each took a quarter of a training step of stage 2 on a
    CPU, and a half of one of stage 1.
    """
    dropped = max(1, round(rate * 256))
    words = torch.randint(-(2**63), 2**63 - 1, ((x.numel() + 7) // 8,), dtype=torch.int64, device=x.device)
    kept = words.view(torch.uint8)[: x.numel()].view(x.shape) >= dropped
    return x * kept.to(x.dtype) * (256 / (256 - dropped))


class Dropout(nn.Module):
    """`dropout` while training, as a module."""

    def __init__(self, rate: float) -> None:
        super().__init__()
        self.rate = rate

    def forward(self, x: Float[Tensor, "*N"]) -> Float[Tensor, "*N"]:
        """Return `x`, parts of it dropped while training."""
        return dropout(x, self.rate) if self.training and self.rate > 0 else x
