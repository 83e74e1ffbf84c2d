"""What is recorded of the gates, and for whom: means per user over the tokens in the mask."""

from __future__ import annotations

from collections.abc import Callable

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from proper.layers.batch_context import BatchContext, RowContext

Draw = Callable[..., Tensor]


def means_by_loop(gates: Tensor, users: list[int], mask: Tensor) -> Tensor:
    """m_u: the mean over all tokens of all of u's rows that are in the mask; zero where there is none."""
    found = []
    for user in range(max(users) + 1):
        tokens = [
            gates[b, t] for b, who in enumerate(users) for t in range(gates.shape[1]) if who == user and mask[b, t]
        ]
        found.append(torch.stack(tokens).mean(0) if tokens else gates.new_zeros(gates.shape[-1]))
    return torch.stack(found)


@given(
    users=st.lists(st.integers(0, 3), min_size=1, max_size=6),
    tokens=st.integers(1, 5),
    experts=st.integers(1, 5),
    share=st.floats(0, 1),
    seed=st.integers(0, 2**31),
)
@settings(max_examples=60)
def test_means_pool_tokens_over_all_rows_of_a_user(
    users: list[int], tokens: int, experts: int, share: float, seed: int, draws: Callable[..., Draw]
) -> None:
    draw = draws(seed)
    gates = draw(len(users), tokens, experts).softmax(-1).requires_grad_()
    mask = draw(len(users), tokens).sigmoid() < share
    routing = BatchContext()

    with routing.use(RowContext("groups", embedding=draw(len(users), 2), users=torch.tensor(users), mask=mask)):
        routing.record("layer", gates)
    found, expected = routing.gates["layer"], means_by_loop(gates, users, mask)

    assert torch.allclose(found, expected, rtol=1e-5, atol=1e-6)
    assert routing.stacked().shape == (1, max(users) + 1, experts)
    weight = draw(*found.shape)
    fast = torch.autograd.grad((found * weight).sum(), gates)[0]
    assert not fast[~mask].any(), "tokens outside the mask must not be pushed"
    if expected.requires_grad:
        slow = torch.autograd.grad((expected * weight).sum(), gates)[0]
        assert torch.allclose(fast, slow, rtol=1e-5, atol=1e-6)


def test_a_long_row_weighs_more_than_a_short_one() -> None:
    gates = torch.tensor([[[1.0, 0.0], [1.0, 0.0], [1.0, 0.0]], [[0.0, 1.0], [0.5, 0.5], [0.5, 0.5]]])
    mask = torch.tensor([[True, True, True], [True, False, False]])
    routing = BatchContext()
    with routing.use(RowContext("groups", users=torch.tensor([0, 0]), mask=mask)):
        routing.record("layer", gates)
    assert torch.allclose(routing.gates["layer"], torch.tensor([[0.75, 0.25]]))


def test_nothing_is_recorded_without_a_mask_or_users() -> None:
    routing, gates = BatchContext(), torch.full((2, 3, 4), 0.25)
    for rows in (
        RowContext("groups", users=torch.tensor([0, 1])),
        RowContext("groups", mask=torch.ones(2, 3, dtype=torch.bool)),
    ):
        with routing.use(rows):
            routing.record("layer", gates)
        assert not routing.gates


def test_the_first_run_of_a_layer_counts() -> None:
    routing = BatchContext()
    rows = RowContext("groups", users=torch.tensor([0]), mask=torch.ones(1, 1, dtype=torch.bool))
    with routing.use(rows):
        routing.record("layer", torch.tensor([[[0.9, 0.1]]]))
        routing.record("layer", torch.tensor([[[0.2, 0.8]]]))
    assert torch.allclose(routing.gates["layer"], torch.tensor([[0.9, 0.1]]))


def test_a_trace_is_the_mean_over_modules_at_the_last_token(draws: Callable[..., Draw]) -> None:
    draw, routing = draws(0), BatchContext()
    modules = {name: draw(2, 3, 4).softmax(-1) for name in ("up", "down")}
    with routing.use(RowContext("groups", trace=True)):
        for name, gates in modules.items():
            routing.record(name, gates)
    found = routing.last()
    assert found is not None
    for row in range(2):
        for expert in range(4):
            mean = (modules["up"][row][2][expert] + modules["down"][row][2][expert]) / 2
            assert torch.isclose(found[row, expert], mean)
    with routing.use(RowContext("groups")):
        routing.record("up", modules["up"])
        assert routing.last() is None, "only where it is asked for"


def test_rows_are_set_inside_the_block_only() -> None:
    routing, rows = BatchContext(), RowContext("groups", embedding=torch.zeros(2, 3))
    assert routing.rows.mode == "off"
    with routing.use(rows):
        assert routing.rows is rows
        with routing.use(RowContext()):
            assert routing.rows.mode == "off"
        assert routing.rows is rows
    assert routing.rows.mode == "off"
    try:
        with routing.use(rows):
            raise KeyError
    except KeyError:
        assert routing.rows.mode == "off"


def test_the_second_run_of_a_checkpointed_layer_sees_the_rows_of_the_first() -> None:
    routing, rows = BatchContext(), RowContext("groups", embedding=torch.zeros(2, 3))
    with routing.use(rows):
        routing.gates["layer"] = torch.ones(1, 1)
        _, again = routing.contexts()
    assert routing.rows is not rows
    with again:
        assert routing.rows is rows
    assert routing.rows.mode == "off" and "layer" in routing.gates
