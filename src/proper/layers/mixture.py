"""The experts of stage 2: E small LoRAs whose outputs are mixed by gates, fused into two matrix products.

    y = s_g * sum_i w_i * B_i A_i x        (method: stage 2)

Stacking the A_i as (E*R, I) and the B_i side by side as (O, E*R) gives the same sum with one product down, one
multiplication by the gates in the middle and one product up, whatever E is. Knows nothing about routers.
"""

from __future__ import annotations

import math

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional

from proper.layers.dropout import dropout


class Experts(nn.Module):
    """E LoRAs of rank R on one linear layer. Weights are fp32; products run in the input's type.

    Attributes:
        down: the A_i, stacked (E*R, I), Kaiming-uniform.
        up: the B_i, side by side (O, E*R), zero at the start.
    """

    def __init__(
        self, inputs: int, outputs: int, *, experts: int, rank: int, alpha: float, dropout: float = 0.0
    ) -> None:
        super().__init__()
        self.experts, self.rank, self.scale, self.dropout = experts, rank, alpha / rank, dropout
        self.down = nn.Parameter(torch.empty(experts * rank, inputs))
        self.up = nn.Parameter(torch.zeros(outputs, experts * rank))
        bound = 1 / math.sqrt(inputs)
        nn.init.uniform_(self.down, -bound, bound)

    def forward(
        self, x: Float[Tensor, "B T I"], gates: Float[Tensor, "B T E"], onto: Float[Tensor, "B T O"] | None = None
    ) -> Float[Tensor, "B T O"]:
        """Return the gated sum of the experts' outputs, added to `onto` (in one pass over it) where that is given."""
        dropped = dropout(x, self.dropout) if self.training and self.dropout > 0 else x
        middle = functional.linear(dropped, self.down.to(x.dtype))
        weights = (gates * self.scale).to(x.dtype).repeat_interleave(self.rank, dim=-1)
        up = self.up.to(x.dtype)
        if onto is None:
            return functional.linear(middle * weights, up)
        flat = torch.addmm(onto.to(x.dtype).flatten(0, 1), (middle * weights).flatten(0, 1), up.t())
        return flat.view(onto.shape).to(onto.dtype)
