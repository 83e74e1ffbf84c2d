"""Folding against the dense sums it stands for; names and ranks as other servers want them."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from proper.errors import InputError
from proper.export.peft_format import (
    RANKS,
    Lora,
    adapter_config,
    folded_experts,
    joined,
    pack,
    scaled,
    served_rank,
    target_names,
    to_peft,
    uniform,
)
from proper.layers.bank import AdapterBank
from proper.layers.layout import Layout

CLOSE = {"rtol": 1e-5, "atol": 1e-6}
SIZES = st.integers(1, 5)


def dense(lora: Lora) -> Tensor:
    return lora.up @ lora.down


@given(experts=SIZES, rank=SIZES, own=SIZES, inputs=SIZES, outputs=SIZES, room=st.integers(0, 9), seed=st.integers(0))
def test_a_folded_layer_is_the_sum_it_stands_for(
    experts: int, rank: int, own: int, inputs: int, outputs: int, room: int, seed: int
) -> None:
    draw = torch.Generator().manual_seed(seed % 2**31)
    downs = [torch.randn(rank, inputs, generator=draw) for _ in range(experts)]
    ups = [torch.randn(outputs, rank, generator=draw) for _ in range(experts)]
    gates = torch.randn(experts, generator=draw).softmax(0)
    a, b = torch.randn(own, inputs, generator=draw), torch.randn(outputs, own, generator=draw)
    expected = 3.0 * (b @ a)
    for gate, down, up in zip(gates, downs, ups, strict=True):
        expected = expected + 0.5 * gate * (up @ down)
    folded = joined([folded_experts(torch.cat(downs), torch.cat(ups, 1), gates, 0.5), scaled(a, b, 3.0)])
    assert folded.rank == experts * rank + own
    torch.testing.assert_close(dense(folded), expected, **CLOSE)
    padded = folded.padded(folded.rank + room)
    assert padded.rank == folded.rank + room
    torch.testing.assert_close(dense(padded), expected, **CLOSE)


def test_a_users_own_lora_is_kept_to_the_last_bit() -> None:
    down, up = torch.randn(4, 6), torch.randn(5, 4)
    lora = scaled(down, up, 2.0)
    assert torch.equal(lora.down, down)
    assert torch.equal(lora.up, 2 * up)


def test_padding_cannot_take_rank_away() -> None:
    with pytest.raises(ValueError, match="rank 4 cannot be padded to rank 3"):
        Lora(torch.zeros(4, 2), torch.zeros(2, 4)).padded(3)


@given(st.integers(1, RANKS[-1]))
def test_the_served_rank_is_the_next_that_is_taken(rank: int) -> None:
    assert served_rank(rank) == min(known for known in RANKS if known >= rank)


def test_the_paper_s_rank_is_padded_and_more_than_servers_take_is_named() -> None:
    assert served_rank(5 * 4 + 4) == 32
    with pytest.raises(InputError, match="rank 513 is more than other servers support"):
        served_rank(513)


def test_peft_s_tensors_have_its_names() -> None:
    loras = uniform({"h.0.up": scaled(torch.randn(2, 3), torch.randn(4, 2), 0.5)}, 8)
    tensors = to_peft(loras)
    assert {name: tuple(tensor.shape) for name, tensor in tensors.items()} == {
        "base_model.model.h.0.up.lora_A.weight": (8, 3),
        "base_model.model.h.0.up.lora_B.weight": (4, 8),
    }
    down, up = tensors.values()
    torch.testing.assert_close(up @ down, dense(loras["h.0.up"]))


NAMES = ["h.0.attn.c_proj", "h.0.mlp.c_proj", "h.0.mlp.c_fc", "h.1.attn.c_proj", "h.1.mlp.c_proj", "h.1.mlp.c_fc"]


@pytest.mark.parametrize(
    ("written", "expected"),
    [
        ([name for name in NAMES if name.endswith("c_fc")], ["c_fc"]),
        ([name for name in NAMES if ".mlp." in name], ["c_fc", "mlp.c_proj"]),
        ([name for name in NAMES if name.endswith("c_proj")], ["c_proj"]),
        (["h.0.mlp.c_fc", "h.1.mlp.c_proj"], ["0.mlp.c_fc", "1.mlp.c_proj"]),
    ],
)
def test_targets_are_the_shortest_names_that_mean_just_these(written: list[str], expected: list[str]) -> None:
    assert target_names(written, ["h", "h.0", *NAMES, "lm_head"]) == expected


def test_the_config_scales_by_one_and_has_one_rank() -> None:
    loras = {"h.0.mlp.c_fc": Lora(torch.zeros(8, 2), torch.zeros(3, 8))}
    config = adapter_config(loras, NAMES, fan_in_fan_out=True)
    assert config["r"] == config["lora_alpha"] == 8
    assert (config["bias"], config["fan_in_fan_out"]) == ("none", True)
    other = {"h.1.mlp.c_fc": Lora(torch.zeros(4, 2), torch.zeros(3, 4))}
    with pytest.raises(ValueError, match=r"all modules must have one rank, not \[4, 8\]"):
        adapter_config(loras | other, NAMES, fan_in_fan_out=True)


def test_a_packed_row_is_what_the_bank_serves(layout: Layout) -> None:
    shapes = {"h.0.up": (4, 6), "h.1.up": (4, 6), "h.0.down": (6, 4), "h.1.down": (6, 4)}
    wide = Layout.of(shapes, 5)
    loras = {name: Lora(torch.randn(3, i), torch.randn(o, 3)) for name, (i, o) in shapes.items() if name != "h.1.down"}
    bank = AdapterBank(wide, 1, alpha=5.0, trainable=False)
    bank.values[0] = pack(loras, wide)
    for name, (inputs, outputs) in shapes.items():
        x = torch.randn(1, 2, inputs)
        expected = x @ dense(loras[name]).T if name in loras else torch.zeros(1, 2, outputs)
        torch.testing.assert_close(bank.lora(name, x, torch.tensor([0]))[1], expected, **CLOSE)
