"""Distance between two low-rank products, from small Gram matrices: no product B A is ever formed.

    |B A - B0 A0|_F^2 = tr((B'B) (A A')) - 2 tr((B'B0) (A0 A')) + tr((B0'B0) (A0 A0'))

With A (R, I) and B (O, R) every matrix on the right is (R, R), so that the cost is linear in I and O. The distance does
not change when B A is written with other factors, as a norm of A and B themselves would.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from jaxtyping import Float
from torch import Tensor

from proper.layers.bank import AdapterBank

Factors = tuple[Float[Tensor, "*N R I"], Float[Tensor, "*N O R"]]
"""A and B of a product B A, with any leading axes."""

OtherFactors = tuple[Float[Tensor, "*N _ I"], Float[Tensor, "*N O _"]]
"""The same with a rank of its own."""


def squared_distance(one: Factors, other: OtherFactors | None = None) -> Float[Tensor, "*N"]:
    """Return |B A - B0 A0|_F^2 of each leading index, differentiable; without `other`, |B A|_F^2."""
    found = _inner(one, one)
    if other is not None:
        found = found - 2 * _inner(one, other) + _inner(other, other)
    return found


def adapter_distance(
    adapter: Mapping[str, Tensor], other: Mapping[str, Tensor] | None = None, scale: float = 1.0
) -> Float[Tensor, ""]:
    """Return the sum over modules of `scale`^2 |B A - B0 A0|_F^2, differentiable.

    Args:
        adapter: stacked tensors "PROJECTION.A" (layers, R, I) and "PROJECTION.B" (layers, O, R), see `Layout.factors`.
        other: the adapter that the distance is to; None for the group model, whose B A is 0.
        scale: factor on both products, `AdapterBank.scale`.
    """
    names = sorted(name.removesuffix(".A") for name in adapter if name.endswith(".A"))
    sums = []
    for name in names:
        pair = None if other is None else (other[f"{name}.A"], other[f"{name}.B"])
        sums.append(squared_distance((adapter[f"{name}.A"], adapter[f"{name}.B"]), pair).sum())
    return scale**2 * torch.stack(sums).sum()


def pull_(bank: AdapterBank, slot: int, anchor: Float[Tensor, "P"] | None, weight: float) -> None:
    """Add to a slot's gradient that of `weight` times its adapter's distance to `anchor`, see `adapter_distance`."""
    assert bank.gradients is not None
    row = bank.values[slot].detach().requires_grad_()
    other = None if anchor is None else bank.layout.factors(anchor.to(row))
    distance = adapter_distance(bank.layout.factors(row), other, bank.scale)
    bank.gradients[slot] += weight * torch.autograd.grad(distance, row)[0]


def _inner(one: Factors, other: OtherFactors) -> Float[Tensor, "*N"]:
    """Return the Frobenius inner product <B A, B0 A0> = tr((B'B0) (A0 A'))."""
    (down, up), (down0, up0) = one, other
    return ((up.mT @ up0) * (down @ down0.mT)).sum((-2, -1))
