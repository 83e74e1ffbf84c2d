"""Mixture of LoRA experts of stage 2: E small LoRAs mixed by gates, fused into two matrix products.

    y = s_g * sum_i w_i * B_i A_i x        (method: stage 2)

Stacking the A_i as (E*R, I) and the B_i side by side as (O, E*R) gives the same sum with one product down, one
multiplication by the gates in between and one product up, whatever E is. `recipes/stage2_groups.py` trains these
experts in a short loop.
"""

from __future__ import annotations

import math

import torch
from jaxtyping import Float
from torch import Tensor, nn

from proper.layers.dropout import dropout


class Experts(nn.Module):
    """E LoRA experts of rank R on one linear layer. Weights are fp32; products run in the input's dtype.

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
        self,
        x: Float[Tensor, "B T I"],
        gates: Float[Tensor, "B T E"],
        onto: Float[Tensor, "B T O"] | None = None,
        middle: Float[Tensor, "ER B T"] | None = None,
    ) -> Float[Tensor, "B T O"]:
        """Return the gated sum of the experts' outputs, added to `onto` (in one pass) if that is given.

        `middle` is the first result of `products` for the same `x`; it is computed here if None.
        """
        if middle is None:
            dropped = dropout(x, self.dropout) if self._drops else x
            middle = tokens_last(self.down, dropped)
        weights = (gates.permute(2, 0, 1) * self.scale).to(x.dtype).unsqueeze(1)
        mixed = (middle.reshape(self.experts, self.rank, *x.shape[:2]) * weights).flatten(2).flatten(0, 1)
        up = self.up.to(x.dtype)
        if onto is None:
            return torch.mm(mixed.t(), up.t()).view(*x.shape[:2], -1)
        flat = torch.addmm(onto.to(x.dtype).flatten(0, 1), mixed.t(), up.t())
        return flat.view(onto.shape).to(onto.dtype)

    def products(
        self, x: Float[Tensor, "B T I"], token: Float[Tensor, "E I"]
    ) -> tuple[Float[Tensor, "ER B T"] | None, Float[Tensor, "E B T"]]:
        """Return all experts' A_i x for `forward`, and a router's W_x x, in one product.

        With dropout, which applies to the experts' input only, the inputs differ and the first result is None.
        """
        if self._drops:
            return None, tokens_last(token, x)
        both = tokens_last(torch.cat((self.down, token)), x)
        return both[: len(self.down)], both[len(self.down) :]

    @property
    def _drops(self) -> bool:
        return self.training and self.dropout > 0


def tokens_last(weights: Float[Tensor, "K I"], x: Float[Tensor, "B T I"]) -> Float[Tensor, "K B T"]:
    """Return the product of each weight row with every token, in the tokens' dtype, with the tokens last in memory.

    Experts and routers have about five values per token. With those last, a softmax or a multiplication by gates runs
    over five values at a time; with the tokens last it runs over long rows, and the two backward products of a thin
    matrix are faster too.
    """
    return torch.mm(weights.to(x.dtype), x.flatten(0, 1).t()).view(-1, *x.shape[:2])
