"""Which layers are adapted."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from torch import nn
from transformers.pytorch_utils import Conv1D

from proper.errors import ConfigError
from proper.models.backbone import Backbone
from proper.models.targets import find_targets, linear_shape

FFN = ["gate_proj", "up_proj", "down_proj"]
ATTENTION = ["q_proj", "k_proj", "v_proj", "o_proj"]


@pytest.mark.parametrize(
    ("wanted", "leaves"),
    [
        ("ffn", FFN),
        ("auto", FFN),
        ("attention", ATTENTION),
        ("all", ATTENTION + FFN),
        (["q_proj"], ["q_proj"]),
        (["mlp.up_proj", "o_proj"], ["o_proj", "up_proj"]),
    ],
)
def test_names_and_kinds(backbone: Callable[..., Backbone], wanted: str | list[str], leaves: list[str]) -> None:
    found = find_targets(backbone().model, wanted)
    assert [name.split(".")[-1] for name in found] == leaves * 2
    assert [name.split(".")[2] for name in found] == ["0"] * len(leaves) + ["1"] * len(leaves)


def test_a_full_name_means_one_module(backbone: Callable[..., Backbone]) -> None:
    name = "model.layers.1.mlp.down_proj"
    assert find_targets(backbone().model, [name]) == {name: (48, 32)}


def test_the_head_is_never_adapted(backbone: Callable[..., Backbone]) -> None:
    with pytest.raises(ConfigError, match=r"target_modules: nothing in LlamaForCausalLM matches \['lm_head'\]"):
        find_targets(backbone().model, ["lm_head"])
    with pytest.raises(ConfigError, match="proj"):
        find_targets(backbone().model, ["proj"])


def test_shapes_of_linear_layers() -> None:
    assert linear_shape(nn.Linear(3, 5)) == (3, 5)
    assert linear_shape(Conv1D(5, 3)) == (3, 5)
    assert linear_shape(nn.Embedding(3, 5)) is None
