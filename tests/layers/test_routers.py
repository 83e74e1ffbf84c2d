"""Both routers against their formulas, token by token."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from proper.layers.routers import LoraAwareRouter, RouterForm, UserAwareRouter, gates_of

Draw = Callable[..., Tensor]


def softmax(scores: Tensor) -> Tensor:
    powers = torch.stack([(score - scores.max().detach()).exp() for score in scores])
    return powers / powers.sum()


def gates_by_loop(router: UserAwareRouter, x: Tensor, embedding: Tensor) -> Tensor:
    """w = softmax(W_x x + W_u e_u); released: softmax(softmax(W_x x) + softmax(W_u e_u))."""
    own = embedding[:, router.span]
    rows = []
    for row, e in zip(x, own, strict=True):
        tokens = []
        for token in row:
            by_token, by_user = router.token @ token, router.user @ e
            if router.form == "released":
                by_token, by_user = softmax(by_token), softmax(by_user)
            tokens.append(softmax(by_token + by_user))
        rows.append(torch.stack(tokens))
    return torch.stack(rows)


@given(
    sizes=st.tuples(*(st.integers(1, most) for most in (3, 4, 6, 5, 5))),  # B, T, I, D, E
    form=st.sampled_from(["default", "released"]),
    offset=st.integers(0, 3),
    seed=st.integers(0, 2**31),
)
@settings(max_examples=40)
def test_user_aware_router(
    sizes: tuple[int, ...],
    form: RouterForm,
    offset: int,
    seed: int,
    draws: Callable[..., Draw],
    close: Callable[..., None],
) -> None:
    rows, tokens, inputs, size, experts = sizes
    draw = draws(seed)
    router = UserAwareRouter(inputs, size, experts, form=form, offset=offset)
    router.token.data.copy_(draw(experts, inputs))
    router.user.data.copy_(draw(experts, size))
    x, embedding = draw(rows, tokens, inputs).requires_grad_(), draw(rows, offset + size + 2).requires_grad_()

    found = router.scores(x, embedding).softmax(-1)
    expected = gates_by_loop(router, x, embedding)

    close("gates", found, expected)
    leaves = {"x": x, "embedding": embedding, "W_x": router.token, "W_u": router.user}
    weight = draw(*found.shape)
    fast = torch.autograd.grad((found * weight).sum(), list(leaves.values()))
    slow = torch.autograd.grad((expected * weight).sum(), list(leaves.values()))
    for name, one, other in zip(leaves, fast, slow, strict=True):
        assert torch.allclose(one, other, rtol=1e-4, atol=1e-6), f"gradient of {name}"
    outside = torch.ones(embedding.shape[1], dtype=torch.bool)
    outside[offset : offset + size] = False
    assert not fast[1][:, outside].any(), "other modules' part of a per-module table"


@given(scale=st.floats(0.1, 1e4), experts=st.integers(2, 8), seed=st.integers(0, 2**31))
@settings(max_examples=20)
def test_released_gates_cannot_pass_their_bound(
    scale: float, experts: int, seed: int, draws: Callable[..., Draw]
) -> None:
    draw = draws(seed)
    router = UserAwareRouter(3, 3, experts, form="released")
    router.token.data.copy_(draw(experts, 3) * scale)
    gates = router.scores(draw(2, 3, 3) * scale, draw(2, 3) * scale).softmax(-1)

    assert float(gates.detach().max()) <= math.e**2 / (math.e**2 + experts - 1) + 1e-6
    assert router.factor == 1 / experts


def test_the_released_bound_is_the_one_the_method_states() -> None:
    router = UserAwareRouter(1, 1, 5, form="released")
    router.token.data.copy_(torch.tensor([[1e4], [0.0], [0.0], [0.0], [0.0]]))
    router.user.data.copy_(router.token.data)

    gates = router.scores(torch.ones(1, 1, 1), torch.ones(1, 1)).softmax(-1)

    assert round(float(gates.detach().max()), 3) == 0.649
    assert UserAwareRouter(1, 1, 5).factor == 1


def test_scores_of_bf16_tokens_are_fp32() -> None:
    router = UserAwareRouter(8, 4, 3)
    scores = router.scores(torch.randn(2, 3, 8).bfloat16(), torch.randn(2, 4))
    assert scores.dtype == torch.float32
    again = router.scores(torch.zeros(2, 3, 8).bfloat16(), torch.full((2, 4), 1 + 2**-12))
    expected = (1 + 2**-12) * router.user.sum(1)
    assert torch.allclose(again[0, 0], expected, rtol=1e-6, atol=1e-7), "the user's part must not be rounded"


@given(
    sizes=st.tuples(*(st.integers(1, most) for most in (3, 4, 6, 5, 3, 5))),  # S, T, I, O, R, E
    scale=st.floats(0.1, 4),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
    seed=st.integers(0, 2**31),
)
@settings(max_examples=40)
def test_precomputed_matrices_give_the_gates_of_the_equation(
    sizes: tuple[int, ...], scale: float, dtype: torch.dtype, seed: int, draws: Callable[..., Draw]
) -> None:
    slots, tokens, inputs, outputs, rank, experts = sizes
    draw = draws(seed)
    router = LoraAwareRouter(outputs, experts)
    router.weight.data.copy_(draw(experts, outputs))
    down, up = draw(slots, rank, inputs), draw(slots, outputs, rank).to(dtype)
    x = draw(slots, tokens, inputs)

    matrices = router.matrices(up, scale)

    assert matrices.shape == (slots, experts, rank) and matrices.dtype == torch.float32
    for slot in range(slots):
        for token in x[slot]:
            h = scale * (up[slot].float() @ (down[slot] @ token))
            expected = softmax(router.weight @ h)
            found = (matrices[slot] @ (down[slot] @ token)).softmax(-1)
            assert torch.allclose(found, expected, rtol=1e-4, atol=1e-5)


def test_lora_aware_router_starts_at_zero_and_gets_its_gradient() -> None:
    router = LoraAwareRouter(3, 2)
    assert not router.weight.any()
    up = torch.randn(1, 3, 2)
    middle = torch.randn(2)
    h = 1.5 * (up[0] @ middle)
    ((router.matrices(up, 1.5)[0] @ middle) * torch.tensor([1.0, -2.0])).sum().backward()
    assert router.weight.grad is not None
    assert torch.allclose(router.weight.grad, torch.outer(torch.tensor([1.0, -2.0]), h), rtol=1e-5)


def test_initial_weights_are_bounded_by_their_inputs() -> None:
    torch.manual_seed(0)
    router = UserAwareRouter(100, 25, 5)
    assert 0.09 < float(router.token.detach().abs().max()) <= 0.1
    assert 0.15 < float(router.user.detach().abs().max()) <= 0.2


@pytest.mark.parametrize("width", [3, 5])
def test_a_narrower_embedding_than_the_routers_is_refused(width: int) -> None:
    router = UserAwareRouter(2, 4, 3, offset=2)
    with pytest.raises(RuntimeError):
        router.scores(torch.ones(1, 1, 2), torch.ones(1, width))


@given(outputs=st.integers(1, 5), rank=st.integers(1, 3), inputs=st.integers(1, 5), seed=st.integers(0, 99))
@settings(max_examples=20)
def test_a_normalized_input_has_the_usual_size_of_every_adapter(
    outputs: int, rank: int, inputs: int, seed: int, draws: Callable[..., Draw], close: Callable[..., None]
) -> None:
    """W_r h_u / c_u, with c_u from the whole product; how strong an adapter is changes nothing."""
    draw, scale = draws(seed), 1.7
    router = LoraAwareRouter(outputs, 3, normalized=True)
    router.weight.data.copy_(draw(3, outputs))
    up, down, x = draw(2, outputs, rank), draw(2, rank, inputs), draw(inputs)
    stronger = torch.tensor([1.0, 30.0]).view(2, 1, 1)
    for found in (
        router.matrices(up * stronger, scale, down),
        router.matrices_of((up * stronger).mT.contiguous(), scale, down),
    ):
        for slot in range(2):
            product = scale * up[slot] @ down[slot]
            usual = product.square().sum().div(outputs).sqrt()
            close("scores", found[slot] @ (down[slot] @ x), router.weight @ (product @ x / usual), 1e-3)


def test_the_task_term_is_that_of_a_one_hot_task_beside_the_embedding(
    draws: Callable[..., Draw], close: Callable[..., None]
) -> None:
    """`W_u e_u + W_t[:, t]` is `[W_u W_t] [e_u; onehot(t)]`, which a router without tasks computes."""
    draw, tasks = draws(0), torch.tensor([2, 0, 1])
    router, plain = UserAwareRouter(4, 5, 3, tasks=3), UserAwareRouter(4, 8, 3)
    assert router.task is not None
    for parameter in router.parameters():
        parameter.data.copy_(draw(*parameter.shape))
    plain.token.data.copy_(router.token)
    plain.user.data.copy_(torch.cat([router.user, router.task], dim=1))
    x, embedding = draw(3, 2, 4), draw(3, 5)
    hot = torch.nn.functional.one_hot(tasks, 3).to(embedding.dtype)
    close("scores", router.scores(x, embedding, tasks), plain.scores(x, torch.cat([embedding, hot], dim=1)))
    with pytest.raises(RuntimeError, match="task of every row"):
        router.scores(x, embedding)


def test_separate_tasks_share_no_expert_and_no_gradient(draws: Callable[..., Draw]) -> None:
    draw, tasks = draws(1), torch.tensor([0, 1])
    router = UserAwareRouter(4, 5, 4, tasks=2, separate=True)
    gates = gates_of(router.scores(draw(2, 3, 4).float(), draw(2, 5).float(), tasks))
    assert (gates[0, :, 1::2] == 0).all() and (gates[1, :, ::2] == 0).all()
    gates.square().sum().backward()  # type: ignore[no-untyped-call]
    assert router.task is not None and router.task.grad is not None
    assert (router.task.grad[1::2, 0] == 0).all() and (router.task.grad[::2, 1] == 0).all()
    assert (router.task.grad[::2, 0] != 0).any()
