"""The fused experts against the sum over experts as it stands in the equation."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from proper.layers.experts import Experts

Draw = Callable[..., Tensor]
SIZES = st.tuples(*(st.integers(1, most) for most in (3, 4, 7, 6, 3, 5)))  # B, T, I, O, R, E


def sum_over_experts(x: Tensor, gates: Tensor, down: list[Tensor], up: list[Tensor], scale: float) -> Tensor:
    """s_g * sum_i w_i * B_i A_i x, token by token."""
    rows = []
    for row, weights in zip(x, gates, strict=True):
        tokens = []
        for token, w in zip(row, weights, strict=True):
            parts = [w[i] * (up[i] @ (down[i] @ token)) for i in range(len(down))]
            tokens.append(scale * torch.stack(parts).sum(0))
        rows.append(torch.stack(tokens))
    return torch.stack(rows)


def built(sizes: tuple[int, ...], draw: Draw, alpha: float = 6.0) -> tuple[Experts, Tensor, Tensor]:
    rows, tokens, inputs, outputs, rank, experts = sizes
    layer = Experts(inputs, outputs, experts=experts, rank=rank, alpha=alpha)
    layer.down.data.copy_(draw(experts * rank, inputs))
    layer.up.data.copy_(draw(outputs, experts * rank))
    return layer, draw(rows, tokens, inputs), draw(rows, tokens, experts).softmax(-1)


@given(sizes=SIZES, seed=st.integers(0, 2**31), double=st.booleans())
@settings(max_examples=40)
def test_values_and_gradients_are_those_of_the_sum_over_experts(
    sizes: tuple[int, ...], seed: int, double: bool, draws: Callable[..., Draw], close: Callable[..., None]
) -> None:
    draw = draws(seed)
    layer, x, gates = built(sizes, draw)
    if double:
        layer, x, gates = layer.double(), x.double(), gates.double()
    rank, experts = sizes[4], sizes[5]
    leaves = {"x": x.requires_grad_(), "gates": gates.requires_grad_(), "down": layer.down, "up": layer.up}
    down = [layer.down[i * rank : (i + 1) * rank] for i in range(experts)]
    up = [layer.up[:, i * rank : (i + 1) * rank] for i in range(experts)]

    found, expected = layer(x, gates), sum_over_experts(x, gates, down, up, 6.0 / rank)

    tolerance = 1e-12 if double else 1e-5
    close("y", found, expected, tolerance)
    weight = draw(*found.shape).to(x.dtype)
    fast = torch.autograd.grad((found * weight).sum(), list(leaves.values()))
    slow = torch.autograd.grad((expected * weight).sum(), list(leaves.values()))
    for name, one, other in zip(leaves, fast, slow, strict=True):
        close(f"gradient of {name}", one, other, tolerance)


@given(sizes=SIZES, seed=st.integers(0, 2**31))
@settings(max_examples=20)
def test_in_bf16_only_products_are_rounded(sizes: tuple[int, ...], seed: int, draws: Callable[..., Draw]) -> None:
    draw = draws(seed)
    layer, x, gates = built(sizes, draw)
    rank, experts = sizes[4], sizes[5]
    low, weight = x.bfloat16(), draw(*x.shape[:2], sizes[3])

    def by_loop(tokens: Tensor, first: Tensor, second: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
        down = [first[i * rank : (i + 1) * rank] for i in range(experts)]
        up = [second[:, i * rank : (i + 1) * rank] for i in range(experts)]
        y = sum_over_experts(tokens, gates, down, up, 6.0 / rank)
        return y.detach(), torch.autograd.grad((y * weight).sum(), second)[0]

    found = layer(low, gates)
    (found * weight.bfloat16()).sum().backward()
    expected, gradient = by_loop(low.float(), layer.down, layer.up, weight)
    # Sums of opposite numbers lose digits, so errors are measured against the sums of the parts' sizes.
    absolute = layer.up.detach().abs().requires_grad_()
    size, gradient_size = by_loop(low.float().abs(), layer.down.detach().abs(), absolute, weight.abs())

    assert found.dtype == torch.bfloat16 and layer.up.grad is not None and layer.up.grad.dtype == torch.float32
    assert float(((found.detach().float() - expected).abs() / (size + 1e-6)).max()) < 0.03
    assert float(((layer.up.grad - gradient).abs() / (gradient_size + 1e-6)).max()) < 0.04


def test_fresh_experts_add_nothing_and_are_kaiming_uniform() -> None:
    torch.manual_seed(0)
    layer = Experts(64, 8, experts=5, rank=4, alpha=8.0)

    assert torch.equal(layer(torch.randn(2, 3, 64), torch.rand(2, 3, 5)), torch.zeros(2, 3, 8))
    assert layer.scale == 2
    assert layer.down.shape == (20, 64) and layer.up.shape == (8, 20)
    assert 0.115 < float(layer.down.detach().abs().max()) <= 1 / 8
    # PEFT's Kaiming-uniform with a = sqrt(5) has this variance: bound^2 / 3 with bound = 1 / sqrt(I).
    assert float(layer.down.detach().var()) == pytest.approx(1 / 64 / 3, rel=0.1)


def test_dropout_works_in_training_only() -> None:
    ones = torch.ones(4, 50, 101)
    layer = Experts(101, 3, experts=2, rank=2, alpha=2.0, dropout=0.5)
    layer.up.data.normal_()
    gates = torch.full((4, 50, 2), 0.5)
    assert torch.equal(layer.eval()(ones, gates), layer(ones, gates))
    assert not torch.equal(layer.train()(ones, gates), layer(ones, gates))


def test_shapes_in_annotations_are_checked() -> None:
    layer = Experts(4, 3, experts=2, rank=1, alpha=1.0)
    with pytest.raises(Exception, match="gates"):
        layer(torch.ones(2, 3, 4), torch.ones(2, 4, 2))
