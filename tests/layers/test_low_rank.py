"""The distance of low-rank products, against the whole products."""

from __future__ import annotations

from collections.abc import Callable

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from proper.layers.bank import AdapterBank
from proper.layers.layout import Layout
from proper.layers.low_rank import adapter_distance, pull_, squared_distance

Draw = Callable[..., Tensor]
SIZES = st.integers(1, 4)


@given(leading=st.lists(SIZES, max_size=2), rank=SIZES, other_rank=SIZES, inputs=SIZES, outputs=SIZES, seed=SIZES)
@settings(max_examples=50)
def test_the_distance_is_that_of_the_whole_products(
    leading: list[int],
    rank: int,
    other_rank: int,
    inputs: int,
    outputs: int,
    seed: int,
    draws: Callable[..., Draw],
    close: Callable[..., None],
) -> None:
    draw = draws(seed, torch.float64)
    one = draw(*leading, rank, inputs), draw(*leading, outputs, rank)
    other = draw(*leading, other_rank, inputs), draw(*leading, outputs, other_rank)
    products = [up @ down for down, up in (one, other)]
    close("to another", squared_distance(one, other), (products[0] - products[1]).square().sum((-2, -1)), 1e-9)
    close("to zero", squared_distance(one), products[0].square().sum((-2, -1)), 1e-9)


def test_other_factors_of_one_product_are_at_no_distance(draws: Callable[..., Draw]) -> None:
    draw = draws(0, torch.float64)
    down, up, turn = draw(3, 5), draw(4, 3), draw(3, 3)
    same = turn @ down, up @ torch.linalg.inv(turn)
    assert abs(float(squared_distance((down, up), same))) < 1e-9 * float(squared_distance((down, up)))


@given(rank=SIZES, scale=st.sampled_from([0.5, 1.0, 2.0]), anchored=st.booleans(), seed=SIZES)
@settings(max_examples=20)
def test_a_slot_is_pulled_by_its_own_distance_only(
    rank: int, scale: float, anchored: bool, seed: int, draws: Callable[..., Draw], close: Callable[..., None]
) -> None:
    """The gradient is autograd's of the whole products, and no other slot's changes."""
    shapes = {"h.0.up": (3, 5), "h.1.up": (3, 5), "h.0.down": (5, 3)}
    layout, draw = Layout.of(shapes, rank), draws(seed, torch.float64)
    bank = AdapterBank(layout, 3, alpha=scale * rank, trainable=True, dtype=torch.float64)
    bank.values.copy_(draw(3, layout.width))
    anchor = draw(layout.width) if anchored else torch.zeros(layout.width, dtype=torch.float64)
    before = draw(3, layout.width)
    assert bank.gradients is not None
    bank.gradients.copy_(before)

    pull_(bank, 1, anchor if anchored else None, 0.3)

    row = bank.values[1].clone().requires_grad_()
    mine, theirs = _products(layout, row), _products(layout, anchor)
    whole = torch.stack([(scale * (mine[name] - theirs[name])).square().sum() for name in shapes]).sum()
    close("distance", adapter_distance(layout.unpack(row), layout.unpack(anchor), scale), whole, 1e-9)
    (expected,) = torch.autograd.grad(0.3 * whole, row)
    close("gradient", bank.gradients[1] - before[1], expected, 1e-9)
    assert torch.equal(bank.gradients[[0, 2]], before[[0, 2]])


def _products(layout: Layout, row: Tensor) -> dict[str, Tensor]:
    parts: dict[str, dict[bool, Tensor]] = {}
    for piece in layout.pieces:
        tensor = row[piece.offset : piece.offset + piece.size].view(piece.shape)
        parts.setdefault(piece.module, {})[piece.down] = tensor
    return {name: both[False] @ both[True] for name, both in parts.items()}
