"""Penalty on the distance of a user's adapter to the one that its training started from (continual learning).

With the modules' A and B, and A_0 and B_0 at the start, the penalty is `distance` times

    sum over modules |B A - B_0 A_0|^2 / sum over modules |B_0 A_0|^2        (Frobenius norms)

the L2-SP penalty (Li, Grandvalet & Davoine 2018, arXiv 1802.01483) on what the adapter does to the layer, which is B A,
in place of A and B themselves: many pairs of them have the same product. Neither product is formed: with R x R matrices

    |B A - B_0 A_0|^2 = <B^T B, A A^T> - 2 <B^T B_0, A A_0^T> + <B_0^T B_0, A_0 A_0^T>
    d / dB            = 2 (B (A A^T) - B_0 (A_0 A^T))        d / dA = 2 ((B^T B) A - (B^T B_0) A_0)
"""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from proper.layers.bank import AdapterBank, Layout
from proper.training.jobs import Job


def pull_back(bank: AdapterBank, slot: int, job: Job) -> float:
    """Add the gradient of a job's penalty to its slot's gradients, and return the penalty; 0 for a job without one."""
    if job.start is None or not job.distance:
        return 0.0
    assert bank.gradients is not None
    start = job.start.to(bank.values)
    size = squared_distance(bank.layout, start, torch.zeros_like(start))
    if size == 0:
        return 0.0
    weight = job.distance / size
    squared, gradient = _squared_distance(bank.layout, bank.values[slot], start)
    bank.gradients[slot].add_(gradient, alpha=weight)
    return weight * squared


def squared_distance(layout: Layout, row: Float[Tensor, "P"], other: Float[Tensor, "P"]) -> float:
    """Return the sum over modules of the squared Frobenius norm of the difference of two adapters' products B A."""
    return _squared_distance(layout, row, other)[0]


def _squared_distance(
    layout: Layout, row: Float[Tensor, "P"], other: Float[Tensor, "P"]
) -> tuple[float, Float[Tensor, "P"]]:
    """Return the squared distance, and its gradient with respect to `row`."""
    gradient, total = torch.zeros_like(row), 0.0
    values, before, moves = layout.unpack(row), layout.unpack(other), layout.unpack(gradient)
    for name in values:
        if not name.endswith(".A"):
            continue
        pair = name.removesuffix(".A") + ".B"
        down, up, down_0, up_0 = values[name], values[pair], before[name], before[pair]  # (L, R, I), (L, O, R)
        downs, ups, crossed, crossed_up = down @ down.mT, up.mT @ up, down @ down_0.mT, up.mT @ up_0
        total += float((ups * downs).sum() - 2 * (crossed_up * crossed).sum())
        total += float(((up_0.mT @ up_0) * (down_0 @ down_0.mT)).sum())
        moves[pair].copy_(2 * (up @ downs - up_0 @ crossed.mT))
        moves[name].copy_(2 * (ups @ down - crossed_up @ down_0))
    return max(0.0, total), gradient
