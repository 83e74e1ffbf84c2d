"""8 or 4 bits per number: no number moves by more than half a step of its block."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.strategies import DrawFn
from torch import Tensor

from proper.adapters.quantization import Storage, decode, dequantize, encode, quantize


@st.composite
def tensors(draw: DrawFn) -> Tensor:
    shape = draw(st.lists(st.integers(1, 5), min_size=1, max_size=3))
    numbers = st.floats(-(2.0**100), 2.0**100, width=32, allow_subnormal=False) | st.floats(
        -1, 1, width=32, allow_subnormal=False
    )
    count = int(torch.tensor(shape).prod())
    return torch.tensor(draw(st.lists(numbers, min_size=count, max_size=count))).view(shape)


@given(x=tensors())
def test_nothing_moves_by_more_than_half_a_step(x: Tensor) -> None:
    q, scale = quantize(x)
    assert (q.dtype, q.shape, scale.dtype, scale.shape) == (torch.int8, x.shape, torch.bfloat16, x.shape[:-1])
    step = scale.double().unsqueeze(-1)
    error = (x.double() - dequantize(q, scale).double()).abs()
    # The quotient that is rounded is an fp32 number, right to one part in 2^24.
    assert (error <= step / 2 * (1 + 2**-16)).all()
    # And the step is no larger than need be: scales have 8 bits.
    assert (step.squeeze(-1) <= x.double().abs().amax(-1) / 127 * (1 + 2**-7) + 1e-40).all()
    assert q.min() >= -127


def test_a_hand_computed_row() -> None:
    q, scale = quantize(torch.tensor([[127.0, -63.4, 0.6], [0.0, 0.0, 0.0]]))
    assert q.tolist() == [[127, -63, 1], [0, 0, 0]] and scale.tolist() == [1.0, 0.0]
    assert dequantize(q, scale).tolist() == [[127.0, -63.0, 1.0], [0.0, 0.0, 0.0]]


@given(x=tensors())
def test_what_has_been_through_it_once_comes_through_unchanged(x: Tensor) -> None:
    once = dequantize(*quantize(x))
    again = dequantize(*quantize(once))
    # A row whose largest number was rounded down a little may get a smaller step; never more than half of one is lost.
    assert ((again - once).abs() <= quantize(once)[1].float().unsqueeze(-1) * 0.51).all()


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_numbers_that_are_not_finite_are_refused_by_name(bad: float) -> None:
    with pytest.raises(ValueError, match=r"h\.up\.A: numbers that are not finite"):
        encode({"h.up.A": torch.tensor([[1.0, bad]])}, "int8")


def test_the_three_forms() -> None:
    adapter = {"x.A": torch.randn(2, 3, 8, generator=torch.Generator().manual_seed(0))}
    assert encode(adapter, "bf16")["x.A"].dtype == torch.bfloat16
    assert torch.equal(encode(adapter, "fp32")["x.A"], adapter["x.A"])
    coded = encode(adapter, "int8")
    assert {name: tensor.dtype for name, tensor in coded.items()} == {"x.A": torch.int8, "x.A:scale": torch.bfloat16}
    back = decode(coded)
    assert list(back) == ["x.A"] and back["x.A"].dtype == torch.float32
    assert (back["x.A"] - adapter["x.A"]).norm() < 0.01 * adapter["x.A"].norm()
    assert decode(adapter) == adapter


@given(
    layers=st.integers(1, 3),
    rows=st.integers(1, 9),
    columns=st.integers(1, 40),
    part=st.sampled_from("ABC"),
    storage=st.sampled_from(["int8", "int4"]),
    seed=st.integers(0, 2**31),
)
def test_stacks_come_back_within_half_a_step_of_their_block(
    layers: int, rows: int, columns: int, part: str, storage: Storage, seed: int
) -> None:
    x = torch.randn(layers, rows, columns, generator=torch.Generator().manual_seed(seed))
    coded = encode({f"x.{part}": x}, storage)
    back = decode(coded)[f"x.{part}"]
    assert back.shape == x.shape

    block = columns if storage == "int8" and part != "C" else rows * columns
    if storage == "int4" and block % 32 == 0:
        block = 32
    most = 127 if storage == "int8" else 7
    largest = x.reshape(-1, block).abs().amax(1, keepdim=True)
    step = largest / most * (1 + 2**-6)
    assert ((back - x).reshape(-1, block).abs() <= step / 2 + 1e-6).all()
    numbers, scales = coded[f"x.{part}"], coded[f"x.{part}:scale"]
    assert scales.numel() == x.numel() // block
    assert numbers.nbytes == x.numel() // (2 if storage == "int4" and columns % 2 == 0 else 1)


def test_four_bits_by_hand() -> None:
    coded = encode({"x.C": torch.tensor([[[7.0, -7.0], [1.4, 0.0]]])}, "int4")
    assert coded["x.C"].dtype == torch.uint8 and coded["x.C"].tolist() == [[[15 | 1 << 4], [9 | 8 << 4]]]
    assert coded["x.C:scale"].tolist() == [1.0]
    assert decode(coded)["x.C"].tolist() == [[[7.0, -7.0], [1.0, 0.0]]]
