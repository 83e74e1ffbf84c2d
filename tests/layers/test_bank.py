"""The bank's layout and its batched LoRA."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from proper.layers.bank import AdapterBank
from proper.layers.layout import Layout

Draw = Callable[..., Tensor]
Shapes = dict[str, tuple[int, int]]

SHAPES: Shapes = {
    "model.layers.0.mlp.up": (3, 5),
    "model.layers.0.mlp.down": (5, 3),
    "model.layers.1.mlp.up": (3, 5),
    "model.layers.1.mlp.down": (5, 3),
}


@st.composite
def modules(draw: st.DrawFn) -> Shapes:
    """Names as models have them: several layers, projections that differ in shape from layer to layer, or not."""
    names = draw(st.lists(st.sampled_from(["q", "up", "down", "mlp.fc"]), min_size=1, max_size=3, unique=True))
    shapes = {}
    for layer in range(draw(st.integers(1, 4))):
        for name in names:
            shapes[f"h.{layer}.{name}"] = (draw(st.integers(1, 3)), draw(st.integers(1, 3)))
    return shapes


@given(shapes=modules(), rank=st.integers(1, 3), seed=st.integers(0, 2**31))
@settings(max_examples=60)
def test_pack_and_unpack_are_inverse(shapes: Shapes, rank: int, seed: int, draws: Callable[..., Draw]) -> None:
    layout = Layout.of(shapes, rank)
    row = draws(seed)(layout.width)

    stored = {name: tensor.clone() for name, tensor in layout.unpack(row).items()}
    other = torch.full((layout.width,), float("nan"))
    layout.pack(stored, other)

    assert torch.equal(other, row)
    assert layout.width == sum(rank * (i + o) for i, o in shapes.values())
    assert sum(tensor.numel() for tensor in stored.values()) == layout.width


@given(shapes=modules(), rank=st.integers(1, 3))
@settings(max_examples=40)
def test_every_number_belongs_to_one_tensor_of_one_module(shapes: Shapes, rank: int) -> None:
    layout = Layout.of(shapes, rank)
    owners = torch.zeros(layout.width, dtype=torch.long)
    for piece in layout.pieces:
        owners[piece.offset : piece.offset + piece.size] += 1
        inputs, outputs = shapes[piece.module]
        assert piece.shape == ((rank, inputs) if piece.down else (outputs, rank))
    assert owners.eq(1).all()
    assert {(piece.module, piece.down) for piece in layout.pieces} == {(n, d) for n in shapes for d in (True, False)}


def test_layers_of_one_projection_are_stacked_and_odd_shapes_stand_alone() -> None:
    layout = Layout.of(SHAPES | {"model.layers.2.mlp.up": (3, 7)}, 2)
    shapes = {key: shape for key, (_, shape) in layout.stacks().items()}
    assert shapes == {
        "model.layers.*.mlp.up.A": (2, 2, 3),
        "model.layers.*.mlp.up.B": (2, 5, 2),
        "model.layers.*.mlp.down.A": (2, 2, 5),
        "model.layers.*.mlp.down.B": (2, 3, 2),
        "model.layers.*.mlp.up@3x7.A": (1, 2, 3),
        "model.layers.*.mlp.up@3x7.B": (1, 7, 2),
    }


def test_what_does_not_fit_is_refused_by_name() -> None:
    layout, row = Layout.of(SHAPES, 2), torch.zeros(Layout.of(SHAPES, 2).width)
    stored = dict(layout.unpack(row))
    wrong = stored | {"model.layers.*.mlp.up.A": torch.zeros(2, 3, 2)}
    with pytest.raises(ValueError, match=r"mlp\.up\.A has shape \(2, 3, 2\), the model's is \(2, 2, 3\)"):
        layout.pack(wrong, row)
    with pytest.raises(ValueError, match=r"does not fit.*extra"):
        layout.pack(stored | {"extra": torch.zeros(1)}, row)
    del stored["model.layers.*.mlp.down.B"]
    with pytest.raises(ValueError, match=r"mlp\.down\.B"):
        layout.pack(stored, row)


def test_bf16_tensors_are_packed_as_fp32() -> None:
    layout = Layout.of(SHAPES, 2)
    row = torch.randn(layout.width)
    stored = {name: tensor.bfloat16() for name, tensor in layout.unpack(row).items()}
    layout.pack(stored, row)
    assert row.dtype == torch.float32 and torch.equal(row, row.bfloat16().float())


def test_modules_read_views_of_the_row() -> None:
    layout = Layout.of(SHAPES, 2)
    bank = AdapterBank(layout, 3, alpha=4.0, trainable=True)
    stored = {name: torch.randn_like(tensor) for name, tensor in layout.unpack(bank.values[1]).items()}
    layout.pack(stored, bank.values[1])
    assert torch.equal(bank.down["model.layers.1.mlp.up"][1], stored["model.layers.*.mlp.up.A"][1])
    assert torch.equal(bank.up["model.layers.0.mlp.down"][1], stored["model.layers.*.mlp.down.B"][0])
    assert not bank.values[[0, 2]].any()
    assert bank.scale == 2


def test_a_fresh_slot_is_kaiming_uniform_and_knows_nothing_of_before() -> None:
    layout = Layout.of({"h.0.up": (400, 30)}, 4)
    bank = AdapterBank(layout, 2, alpha=8.0, trainable=True)
    bank.values.fill_(7.0)

    bank.fresh(1, torch.Generator().manual_seed(3))

    assert bank.values[0].eq(7).all()
    down, up = bank.down["h.0.up"][1], bank.up["h.0.up"][1]
    assert not up.any()
    assert 0.0498 < float(down.detach().abs().max()) <= 0.05
    assert float(down.detach().var()) == pytest.approx(1 / 400 / 3, rel=0.1)
    again = bank.values[1].clone()
    bank.fresh(0, torch.Generator().manual_seed(3))
    assert torch.equal(bank.values[0], again), "start values depend on the generator only"


@given(
    sizes=st.tuples(*(st.integers(1, most) for most in (4, 4, 5, 4, 3))),  # S, T, I, O, R
    data=st.data(),
    seed=st.integers(0, 2**31),
)
@settings(max_examples=50)
def test_lora_of_mixed_rows(sizes: tuple[int, ...], data: st.DataObject, seed: int, draws: Callable[..., Draw]) -> None:
    slots, tokens, inputs, outputs, rank = sizes
    rows = data.draw(st.lists(st.integers(-1, slots - 1), min_size=1, max_size=5))
    draw = draws(seed)
    bank = AdapterBank(Layout.of({"h.0.up": (inputs, outputs)}, rank), slots, alpha=3.0, trainable=True)
    bank.values.copy_(draw(*bank.values.shape))
    x = draw(len(rows), tokens, inputs).requires_grad_()

    middle, own = bank.lora("h.0.up", x, torch.tensor(rows))
    weight = draw(*own.shape)
    (own * weight).sum().backward()
    assert bank.gradients is not None and x.grad is not None
    fast, fast_x = bank.gradients.clone(), x.grad.clone()

    layout = bank.layout
    values = bank.values.clone().requires_grad_()
    total = torch.zeros(())
    for b, slot in enumerate(rows):
        for t in range(tokens):
            if slot < 0:
                assert not own[b, t].any() and not middle[b, t].any()
                continue
            stored = layout.unpack(values[slot])
            down, up = stored["h.*.up.A"][0], stored["h.*.up.B"][0]
            h = 3.0 / rank * (up @ (down @ x[b, t]))
            assert torch.allclose(own[b, t], h, rtol=1e-5, atol=1e-5)
            assert torch.allclose(middle[b, t], down @ x[b, t], rtol=1e-5, atol=1e-5)
            total = total + (h * weight[b, t]).sum()
    if total.requires_grad:
        slow, slow_x = torch.autograd.grad(total, [values, x])
        assert torch.allclose(fast, slow, rtol=1e-4, atol=1e-5)
        assert torch.allclose(fast_x, slow_x, rtol=1e-4, atol=1e-5)
    for slot in set(range(slots)) - set(rows):
        assert not fast[slot].any(), "a user who is not in the batch has no gradient"


@pytest.mark.parametrize("trainable", [True, False])
def test_only_a_trainable_bank_has_gradients(trainable: bool) -> None:
    bank = AdapterBank(Layout.of(SHAPES, 2), 2, alpha=4.0, trainable=trainable)
    _, own = bank.lora("model.layers.0.mlp.up", torch.ones(1, 1, 3), torch.tensor([0]))
    assert own.requires_grad == trainable
    assert (bank.gradients is not None) == trainable


def test_gradients_collect_in_the_bank_over_several_passes() -> None:
    bank = AdapterBank(Layout.of(SHAPES, 2), 2, alpha=4.0, trainable=True)
    assert bank.gradients is not None
    bank.values.normal_()
    x, slots = torch.randn(2, 3, 3), torch.tensor([0, 1])
    bank.lora("model.layers.0.mlp.up", x, slots)[1].sum().backward()
    once = bank.gradients.clone()
    bank.lora("model.layers.0.mlp.up", x, slots)[1].sum().backward()
    assert once.any() and torch.allclose(bank.gradients, 2 * once)
    assert math.isclose(bank.scale, 2.0)


def _bases(draw: Draw, shapes: Shapes, rank: int) -> dict[str, tuple[Tensor, Tensor]]:
    return {name: (draw(rank, inputs), draw(outputs, rank)) for name, (inputs, outputs) in shapes.items()}


@given(
    sizes=st.tuples(*(st.integers(1, most) for most in (4, 4, 5, 4, 3))),  # S, T, I, O, R
    data=st.data(),
    seed=st.integers(0, 2**31),
)
@settings(max_examples=50)
def test_cores_of_mixed_rows(
    sizes: tuple[int, ...], data: st.DataObject, seed: int, draws: Callable[..., Draw]
) -> None:
    slots, tokens, inputs, outputs, rank = sizes
    rows = data.draw(st.lists(st.integers(-1, slots - 1), min_size=1, max_size=5))
    draw = draws(seed)
    bases = _bases(draw, {"h.0.up": (inputs, outputs)}, rank)
    layout = Layout.of({"h.0.up": (inputs, outputs)}, rank, bases)
    bank = AdapterBank(layout, slots, alpha=3.0, trainable=True)
    bank.values.copy_(draw(*bank.values.shape))
    x, onto = draw(len(rows), tokens, inputs).requires_grad_(), draw(len(rows), tokens, outputs)
    numbers = torch.tensor(rows)

    middle, own = bank.lora("h.0.up", x, numbers)
    weight = draw(*own.shape)
    (own * weight).sum().backward()
    assert bank.gradients is not None and x.grad is not None
    fast, fast_x = bank.gradients.clone(), x.grad.clone()

    values = bank.values.clone().requires_grad_()
    (down, up), total = bases["h.0.up"], torch.zeros(())
    for b, slot in enumerate(rows):
        core = layout.unpack(values[slot])["h.*.up.C"][0] if slot >= 0 else torch.zeros(rank, rank)
        for t in range(tokens):
            h = 3.0 / rank * (up @ (core @ (down @ x[b, t])))
            assert torch.allclose(own[b, t], h, rtol=1e-4, atol=1e-5)
            assert torch.allclose(middle[b, t], down @ x[b, t], rtol=1e-4, atol=1e-5)
            total = total + (h * weight[b, t]).sum()
        alone = bank.lora("h.0.up", x[b : b + 1], numbers[b : b + 1])[1][0]
        assert torch.allclose(own[b], alone, rtol=1e-5, atol=1e-6), "a row does not depend on its neighbours"
    if any(slot >= 0 for slot in rows):
        slow, slow_x = torch.autograd.grad(total, [values, x])
        assert torch.allclose(fast, slow, rtol=1e-4, atol=1e-4)
        assert torch.allclose(fast_x, slow_x, rtol=1e-4, atol=1e-4)
    for slot in set(range(slots)) - set(rows):
        assert not fast[slot].any(), "a user who is not in the batch has no gradient"
    with torch.no_grad():
        decoded = bank.lora_of(x, bank.gathered("h.0.up", numbers, torch.float32), onto)[1]
        assert torch.allclose(decoded, bank.lora("h.0.up", x, numbers, onto)[1], rtol=1e-4, atol=1e-5)


@given(shapes=modules(), rank=st.integers(1, 3), seed=st.integers(0, 2**31))
@settings(max_examples=40)
def test_a_core_is_a_lora_of_the_shared_a_and_b_times_the_core(
    shapes: Shapes, rank: int, seed: int, draws: Callable[..., Draw]
) -> None:
    draw = draws(seed)
    layout, plain = Layout.of(shapes, rank, _bases(draw, shapes, rank)), Layout.of(shapes, rank)
    cores = AdapterBank(layout, 2, alpha=4.0, trainable=False)
    cores.values.copy_(draw(*cores.values.shape))
    loras = AdapterBank(plain, 2, alpha=4.0, trainable=False)
    for slot in range(2):
        plain.pack(layout.factors(cores.values[slot]), loras.values[slot])
    assert layout.width == rank * rank * len(shapes)

    slots = torch.tensor([1, -1, 0])
    for name, (inputs, _) in shapes.items():
        x = draw(3, 2, inputs)
        assert torch.allclose(cores.lora(name, x, slots)[1], loras.lora(name, x, slots)[1], rtol=1e-4, atol=1e-4)
        some = torch.tensor([1, 0])
        assert torch.allclose(cores.downs(name, some), loras.downs(name, some))
        assert torch.allclose(cores.ups(name, some), loras.ups(name, some), rtol=1e-4, atol=1e-5)


def test_a_fresh_core_changes_nothing_and_one_without_bases_is_refused() -> None:
    bank = AdapterBank(Layout.of(SHAPES, 2, {}), 1, alpha=4.0, trainable=True)
    bank.values.fill_(7.0)
    bank.fresh(0, torch.Generator().manual_seed(0))
    assert not bank.values.any() and "model.layers.0.mlp.up" in bank
    with pytest.raises(RuntimeError, match="shared bases"):
        bank.lora("model.layers.0.mlp.up", torch.ones(1, 1, 3), torch.tensor([0]))
