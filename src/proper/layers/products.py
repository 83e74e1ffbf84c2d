"""Matrix products of thin weights (few output rows) with all tokens, with the token dimension last in memory.

Experts and routers have about five values per token. With those last, a softmax or a multiplication by gates runs over
five values at a time; with the tokens last it runs over long rows, and the two backward products of a thin matrix are
faster too.
"""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor


def tokens_last(weights: Float[Tensor, "K I"], x: Float[Tensor, "B T I"]) -> Float[Tensor, "K B T"]:
    """Return the product of each weight row with every token, in the tokens' dtype."""
    return torch.mm(weights.to(x.dtype), x.flatten(0, 1).t()).view(-1, *x.shape[:2])
