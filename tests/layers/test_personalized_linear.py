"""The whole layer against the method's equations of stages 2, 3a and 3b, row by row and token by token."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import get_args

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from proper.layers.bank import AdapterBank
from proper.layers.batch_context import BatchContext, GatheredWeights, Mode, RowContext
from proper.layers.dropout import dropout_mask
from proper.layers.experts import Experts
from proper.layers.layout import Layout
from proper.layers.personalized_linear import AdaptedLinear
from proper.layers.routers import LoraAwareRouter, UserAwareRouter

Draw = Callable[..., Tensor]
NAME = "h.0.up"


def built(inputs: int, outputs: int, rank: int, experts: int, form: str, kind: str, draw: Draw) -> AdaptedLinear:
    """A layer with experts, three users' adapters and a router of stage 3b, all random."""
    layer = AdaptedLinear(NAME, nn.Linear(inputs, outputs), inputs, outputs, BatchContext())
    layer.experts = Experts(inputs, outputs, experts=experts, rank=rank, alpha=3.0)
    layer.router = UserAwareRouter(inputs, 2, experts, form="released" if form == "released" else "default")
    layer.bank = AdapterBank(Layout.of({NAME: (inputs, outputs)}, rank), 3, alpha=5.0, trainable=True)
    layer.bank.values.copy_(draw(*layer.bank.values.shape))
    layer.residual = kind == "residual"
    if kind != "none":
        layer.lora_router = LoraAwareRouter(outputs, experts)
    for parameter in layer.parameters():
        parameter.data.copy_(draw(*parameter.shape))
    return layer


def output_of_token(layer: AdaptedLinear, values: Tensor, x: Tensor, e: Tensor, slot: int, mode: Mode) -> Tensor:
    """The method's equations for one token: y = W x + s_g sum_i b_i B_i A_i x + h_u."""
    experts, router, bank = layer.experts, layer.router, layer.bank
    assert experts is not None and router is not None and bank is not None
    y = layer.base(x)
    if mode == "off":
        return y
    own = None
    if mode != "groups" and slot >= 0:
        stored = bank.layout.unpack(values[slot])
        own = bank.scale * (stored["h.*.up.B"][0] @ (stored["h.*.up.A"][0] @ x))
    by_token, by_user = router.token @ x, router.user @ e
    released = router.form == "released"
    logits = by_token.softmax(-1) + by_user.softmax(-1) if released else by_token + by_user
    if mode == "users" and own is not None and layer.lora_router is not None:
        logits = (logits if layer.residual else 0) + layer.lora_router.weight @ own
    gates = logits.softmax(-1) * (1 / experts.experts if released else 1)
    for i in range(experts.experts):
        part = slice(i * experts.rank, (i + 1) * experts.rank)
        y = y + experts.scale * gates[i] * (experts.up[:, part] @ (experts.down[part] @ x))
    return y if own is None else y + own


@given(
    sizes=st.tuples(*(st.integers(1, most) for most in (3, 5, 5, 3, 4))),  # T, I, O, R, E
    slots=st.lists(st.integers(-1, 2), min_size=1, max_size=4),
    mode=st.sampled_from(get_args(Mode)),
    form=st.sampled_from(["default", "released"]),
    kind=st.sampled_from(["residual", "paper", "none"]),
    seed=st.integers(0, 2**31),
)
@settings(max_examples=80)
def test_values_and_gradients_of_every_mode(
    sizes: tuple[int, ...],
    slots: list[int],
    mode: Mode,
    form: str,
    kind: str,
    seed: int,
    draws: Callable[..., Draw],
    close: Callable[..., None],
) -> None:
    tokens, inputs, outputs, rank, experts = sizes
    draw = draws(seed)
    layer = built(inputs, outputs, rank, experts, form, kind, draw)
    assert layer.bank is not None and layer.bank.gradients is not None
    x, e = draw(len(slots), tokens, inputs).requires_grad_(), draw(len(slots), 2).requires_grad_()

    with layer.routing.use(RowContext(mode, embedding=e, slots=torch.tensor(slots))):
        found = layer(x)
    values = layer.bank.values.clone().requires_grad_()
    expected = torch.stack(
        [
            torch.stack([output_of_token(layer, values, token, e[b], slot, mode) for token in x[b]])
            for b, slot in enumerate(slots)
        ]
    )

    close("y", found, expected)
    rows = RowContext(mode, embedding=e, slots=torch.tensor(slots), gathered=GatheredWeights())
    with torch.no_grad(), layer.routing.use(rows):
        for time in ("first", "second"):
            close(f"y where adapters are kept, the {time} time", layer(x), expected)
    leaves = {"x": x, "e": e, **dict(layer.named_parameters())}
    weight = draw(*found.shape)
    names, tensors = list(leaves), list(leaves.values())
    slow = torch.autograd.grad((expected * weight).sum(), [*tensors, values], allow_unused=True)
    (found * weight).sum().backward()
    scale = max(float(g.norm()) for g in slow if g is not None)
    for name, tensor, other in zip(names, tensors, slow, strict=False):
        mine = torch.zeros_like(tensor) if tensor.grad is None else tensor.grad
        theirs = torch.zeros_like(tensor) if other is None else other
        assert float((mine - theirs).norm()) <= 2e-5 * max(scale, 1), f"gradient of {name}"
    theirs = torch.zeros_like(values) if slow[-1] is None else slow[-1]
    assert float((layer.bank.gradients - theirs).norm()) <= 2e-5 * max(scale, 1), "gradient of the adapters"


@pytest.mark.parametrize("mode", ["groups", "fit", "users"])
def test_rows_that_a_backbone_flattens(mode: Mode, draws: Callable[..., Draw]) -> None:
    draw = draws(0)
    layer = built(4, 3, 2, 3, "default", "residual", draw)
    x, rows = draw(2, 5, 4), RowContext(mode, embedding=draw(2, 2), slots=torch.tensor([1, 0]))
    with layer.routing.use(rows):
        assert torch.equal(layer(x.flatten(0, 1)), layer(x).flatten(0, 1))


def test_bf16_stays_bf16_and_near(draws: Callable[..., Draw]) -> None:
    draw = draws(1)
    layer = built(16, 12, 2, 3, "default", "residual", draw)
    x, rows = draw(3, 6, 16), RowContext("users", embedding=draw(3, 2), slots=torch.tensor([1, -1, 0]))
    with layer.routing.use(rows), torch.no_grad():
        exact = layer(x.bfloat16().float())
        layer.base = layer.base.bfloat16()
        found = layer(x.bfloat16())
    assert found.dtype == torch.bfloat16
    assert float((found.float() - exact).norm() / exact.norm()) < 0.03


def test_with_zero_adapters_the_residual_router_is_stage_2_to_the_bit(draws: Callable[..., Draw]) -> None:
    draw = draws(2)
    layer = built(8, 6, 2, 4, "default", "residual", draw)
    assert layer.bank is not None
    for view in layer.bank.up.values():
        view.data.zero_()
    x, e, slots = draw(3, 5, 8), draw(3, 2), torch.tensor([0, 2, -1])
    outputs = {}
    for mode in get_args(Mode):
        with layer.routing.use(RowContext(mode, embedding=e, slots=slots)):
            outputs[mode] = layer(x)
    assert torch.equal(outputs["users"], outputs["groups"]) and torch.equal(outputs["fit"], outputs["groups"])
    assert not torch.allclose(outputs["groups"], outputs["off"])
    layer.residual = False
    with layer.routing.use(RowContext("users", embedding=e, slots=slots)):
        paper = layer(x)
    assert not torch.allclose(paper[:2], outputs["groups"][:2]), "the paper's form starts at the uniform mixture"
    assert torch.equal(paper[2], outputs["groups"][2]), "a row without an adapter keeps stage 2's gates"


def test_with_zero_experts_stage_2_is_the_backbone_to_the_bit(draws: Callable[..., Draw]) -> None:
    draw = draws(3)
    layer = built(8, 6, 2, 4, "default", "residual", draw)
    assert layer.experts is not None
    layer.experts.up.data.zero_()
    x = draw(3, 5, 8)
    with layer.routing.use(RowContext("groups", embedding=draw(3, 2))):
        assert torch.equal(layer(x), layer.base(x))


def test_a_mixture_without_embeddings_is_an_error(draws: Callable[..., Draw]) -> None:
    layer = built(2, 2, 1, 2, "default", "none", draws(4))
    with (
        layer.routing.use(RowContext("groups", slots=torch.tensor([0]))),
        pytest.raises(RuntimeError, match="embedding"),
    ):
        layer(torch.ones(1, 1, 2))


@given(
    kinds=st.lists(st.tuples(st.booleans(), st.integers(-1, 2)), min_size=1, max_size=5),
    mode=st.sampled_from(["groups", "users"]),
    seed=st.integers(0, 2**31),
)
@settings(max_examples=40)
def test_rows_without_experts_are_the_backbones_to_the_bit(
    kinds: list[tuple[bool, int]], mode: Mode, seed: int, draws: Callable[..., Draw]
) -> None:
    """Beside others, whose own numbers do not change either."""
    draw = draws(seed)
    layer = built(4, 3, 2, 3, "default", "residual", draw)
    grouped = torch.tensor([own for own, _ in kinds])
    slots = torch.tensor([slot if own else -1 for own, slot in kinds])
    x, e = draw(len(kinds), 3, 4), draw(len(kinds), 2)
    with torch.no_grad():
        with layer.routing.use(RowContext(mode, embedding=e, slots=slots)):
            whole = layer(x)
        with layer.routing.use(RowContext(mode, embedding=e, slots=slots, experts=grouped, trace=True)):
            found, gates = layer(x), layer.routing.last()
        assert torch.equal(found[grouped], whole[grouped])
        assert torch.equal(found[~grouped], layer.base(x)[~grouped])
    assert gates is not None and torch.allclose(gates.sum(-1), grouped.float())


def test_recorded_gates_sum_to_one_in_the_released_form_too(draws: Callable[..., Draw]) -> None:
    draw = draws(5)
    layer = built(4, 3, 2, 5, "released", "none", draw)
    mask = torch.ones(2, 3, dtype=torch.bool)
    with layer.routing.use(RowContext("groups", embedding=draw(2, 2), users=torch.tensor([0, 1]), mask=mask)):
        layer(draw(2, 3, 4))
    assert torch.allclose(layer.routing.gates[NAME].sum(-1), torch.ones(2))


def generators(*seeds: int) -> tuple[torch.Generator, ...]:
    return tuple(torch.Generator().manual_seed(seed) for seed in seeds)


def test_a_rows_dropout_does_not_depend_on_padding_or_neighbours() -> None:
    x = torch.ones(2, 6, 40)
    mask = torch.tensor([[False] * 2 + [True] * 4, [True] * 6])
    both = dropout_mask(x, 0.5, RowContext("fit", mask=mask, generators=generators(1, 2)))
    alone = dropout_mask(x[:1, 2:], 0.5, RowContext("fit", mask=mask[:1, 2:], generators=generators(1)))
    assert torch.equal(both[0, 2:], alone[0]) and both[0, :2].eq(1).all()
    assert sorted(both[1].unique().tolist()) == [0.0, 2.0]
    assert float((both[1] == 0).float().mean()) == pytest.approx(0.5, abs=0.1)
    assert not torch.equal(both[0, 2:], both[1, 2:])


def test_user_dropout_touches_the_adapter_only(draws: Callable[..., Draw]) -> None:
    draw = draws(6)
    layer = built(8, 6, 2, 4, "default", "none", draw)
    layer.user_dropout = 0.5
    x, e, mask = draw(2, 5, 8), draw(2, 2), torch.ones(2, 5, dtype=torch.bool)
    rows = RowContext("fit", embedding=e, slots=torch.tensor([0, -1]), mask=mask, generators=generators(1, 2))
    with layer.routing.use(rows):
        dropped = layer(x)
    with layer.routing.use(RowContext("fit", embedding=e, slots=torch.tensor([0, -1]))):
        whole = layer(x)
    assert not torch.allclose(dropped[0], whole[0])
    assert torch.equal(dropped[1], whole[1])


@pytest.mark.parametrize("kind", ["residual", "paper", "none"])
def test_a_broken_adapter_stays_with_its_owner(kind: str) -> None:
    generator = torch.Generator().manual_seed(0)
    layer = built(4, 3, 2, 3, "default", kind, lambda *shape: torch.randn(*shape, generator=generator))
    assert layer.bank is not None
    x, e = torch.randn(2, 5, 4, generator=generator), torch.randn(2, 2, generator=generator)
    rows = RowContext("users", embedding=e, slots=torch.tensor([0, -1]))
    with torch.no_grad(), layer.routing.use(rows):
        whole = layer(x)
        layer.bank.values[0] = float("nan")
        broken = layer(x)
    assert broken[0].isnan().all()
    assert torch.equal(broken[1], whole[1])


def test_kept_adapters_of_one_bf16_token(draws: Callable[..., Draw]) -> None:
    draw = draws(3)
    layer = built(24, 40, 4, 3, "default", "residual", draw)
    layer.base.to(torch.bfloat16)
    assert layer.bank is not None
    layer.bank = AdapterBank(layer.bank.layout, 3, alpha=5.0, trainable=False, dtype=torch.bfloat16)
    layer.bank.values.copy_(draw(*layer.bank.values.shape))
    x, e = draw(4, 1, 24).bfloat16(), draw(4, 2)
    rows = RowContext("users", embedding=e, slots=torch.tensor([2, -1, 0, 2]))
    with torch.no_grad():
        with layer.routing.use(rows):
            expected = layer(x)
        with layer.routing.use(replace(rows, gathered=GatheredWeights())):
            found = layer(x)
    assert found.dtype == torch.bfloat16
    assert float((found.float() - expected.float()).norm()) <= 0.02 * float(expected.float().norm())
