"""Products of a few rows of weights with all tokens, the tokens last in memory.

Experts and routers have some five numbers a token. With those last, a softmax or a multiplication by gates walks five
numbers at a time; with the tokens last it runs over long rows, and the two backward products of a thin matrix are
faster too. Knows nothing about what the rows mean.
"""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor


def tokens_last(weights: Float[Tensor, "K I"], x: Float[Tensor, "B T I"]) -> Float[Tensor, "K B T"]:
    """Return each row of the weights times every token, in the tokens' dtype."""
    return torch.mm(weights.to(x.dtype), x.flatten(0, 1).t()).view(-1, *x.shape[:2])
