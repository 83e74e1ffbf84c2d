"""The constraint's three kinds against loops over modules, users and experts."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from proper.layers.routing_losses import Kind, constraint_loss

Draw = Callable[..., Tensor]


def cosine_of_pairs(gates: Tensor) -> Tensor:
    modules, users, _ = gates.shape
    found = [
        (gates[m, u] @ gates[m, v]) / (gates[m, u].norm() * gates[m, v].norm())
        for m in range(modules)
        for u in range(users)
        for v in range(users)
        if u != v
    ]
    return torch.stack(found).mean() if found else gates.new_zeros(())


def spread(gates: Tensor) -> Tensor:
    modules, users, experts = gates.shape
    found = []
    for m in range(modules):
        for u in range(users):
            found.append(1 - sum((gates[m, u, i] ** 2 for i in range(experts)), start=torch.zeros(())))
    return torch.stack(found).mean()


def products_of_experts(gates: Tensor) -> Tensor:
    modules, users, experts = gates.shape
    found = []
    for m in range(modules):
        for u in range(users):
            pairs = [(gates[m, u, i] * gates[m, u, j]).abs() for i in range(experts) for j in range(experts) if i != j]
            found.append(sum(pairs, start=torch.zeros(())))
    return torch.stack(found).mean()


LOOPS: dict[Kind, Callable[[Tensor], Tensor]] = {
    "users": cosine_of_pairs,
    "experts": spread,
    "released": products_of_experts,
}


@given(
    sizes=st.tuples(st.integers(1, 4), st.integers(1, 5), st.integers(1, 6)),
    kind=st.sampled_from(list(LOOPS)),
    sharp=st.floats(0.1, 8),
    seed=st.integers(0, 2**31),
)
@settings(max_examples=60)
def test_values_and_gradients(
    sizes: tuple[int, int, int], kind: Kind, sharp: float, seed: int, draws: Callable[..., Draw]
) -> None:
    gates = (draws(seed)(*sizes) * sharp).softmax(-1).requires_grad_()

    found, expected = constraint_loss(kind, gates), LOOPS[kind](gates)

    assert torch.allclose(found, expected, rtol=1e-5, atol=1e-5)
    alone = kind == "users" and sizes[1] == 1
    assert found.requires_grad == (kind != "released" and not alone)
    if found.requires_grad:
        fast, slow = torch.autograd.grad(found, gates)[0], torch.autograd.grad(expected, gates)[0]
        assert torch.allclose(fast, slow, rtol=1e-4, atol=1e-5)


def test_one_user_has_nobody_to_differ_from() -> None:
    assert float(constraint_loss("users", torch.rand(3, 1, 5))) == 0


def test_extremes() -> None:
    one_hot = torch.eye(4).unsqueeze(0)
    assert float(constraint_loss("users", one_hot)) == pytest.approx(0, abs=1e-6)
    assert float(constraint_loss("users", torch.full((2, 3, 5), 0.2))) == pytest.approx(1)
    assert float(constraint_loss("experts", one_hot)) == pytest.approx(0)
    assert float(constraint_loss("experts", torch.full((2, 3, 5), 0.2))) == pytest.approx(0.8)
    assert float(constraint_loss("released", torch.full((2, 3, 5), 0.2))) == pytest.approx(0.8)


def test_none_costs_nothing_and_has_no_gradient() -> None:
    loss = constraint_loss("none", torch.rand(2, 3, 4, requires_grad=True))
    assert float(loss) == 0 and not loss.requires_grad


@pytest.mark.parametrize("kind", ["users", "experts"])
def test_bf16_gates_are_summed_in_fp32(kind: Kind) -> None:
    gates = torch.rand(2, 40, 5).softmax(-1)
    assert float(constraint_loss(kind, gates.bfloat16())) == pytest.approx(
        float(constraint_loss(kind, gates)), abs=4e-3
    )
