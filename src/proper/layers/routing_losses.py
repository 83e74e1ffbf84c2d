"""Routing losses of stage 2: penalties that push distinct users to distinct expert mixtures (constraint loss).

All functions take mean gates (M, U, E): for each module and user, the mean gate distribution over the user's tokens.
`recipes/stage2_groups.py` trains with the constraint loss in a short loop.
"""

from __future__ import annotations

from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional

Kind = Literal["users", "experts", "released", "none"]


def constraint_loss(kind: Kind, gates: Float[Tensor, "M U E"]) -> Float[Tensor, ""]:
    """Return the penalty of the given kind, a scalar; "none" gives 0."""
    if kind == "users":
        return user_cosine(gates)
    if kind == "experts":
        return expert_spread(gates)
    if kind == "released":
        return released_penalty(gates)
    return gates.new_zeros(())


def user_cosine(gates: Float[Tensor, "M U E"]) -> Float[Tensor, ""]:
    """Return the mean cosine between two users' mean gates, over modules and pairs of users; 0 with one user."""
    users = gates.shape[1]
    if users < 2:
        return gates.new_zeros(())
    unit = functional.normalize(gates.float(), dim=-1)
    # The sum over all pairs is |sum of unit vectors|^2; the diagonal, one per user, is subtracted.
    pairs = unit.sum(1).square().sum(-1) - unit.square().sum((1, 2))
    return (pairs / (users * (users - 1))).mean()


def expert_spread(gates: Float[Tensor, "M U E"]) -> Float[Tensor, ""]:
    """Return the mean over modules and users of `1 - |m|^2`: the released penalty, with its gradient."""
    return (1 - gates.float().square().sum(-1)).mean()


def released_penalty(gates: Float[Tensor, "M U E"]) -> Float[Tensor, ""]:
    """Return the released code's penalty, the mean of sum over i != j of |m_i m_j|, detached: without a gradient."""
    with torch.no_grad():
        total = gates.float().abs().sum(-1).square() - gates.float().square().sum(-1)
        return total.mean()
