"""Which layers are adapted."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace

import pytest
from torch import nn
from transformers.pytorch_utils import Conv1D

from proper.config import GroupsConfig, UsersConfig
from proper.errors import ConfigError
from proper.models.backbone import Backbone
from proper.models.targets import decoder_layers, expert_targets, find_targets, linear_shape, user_targets

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


def test_layers_that_are_not_there_are_named_with_their_key(backbone: Callable[..., Backbone]) -> None:
    model = backbone().model
    with pytest.raises(ConfigError, match=r"^groups.layers: 3 is more than the 2 decoder layers of LlamaForCausalLM$"):
        expert_targets(model, GroupsConfig(layers=3))
    below = GroupsConfig(layers=1, target_modules=["model.layers.0.mlp.up_proj"])
    with pytest.raises(ConfigError, match=r"^groups.layers: none of groups.target_modules is in the last 1 layers"):
        expert_targets(model, below)
    with pytest.raises(ConfigError, match=r"^users.layers: 3 is more than the 2 layers with experts$"):
        user_targets(expert_targets(model, GroupsConfig()), UsersConfig(layers=3))


def test_users_get_the_last_of_the_layers_with_experts(backbone: Callable[..., Backbone]) -> None:
    shapes = expert_targets(backbone().model, GroupsConfig())
    assert user_targets(shapes, UsersConfig()) == shapes
    assert list(user_targets(shapes, UsersConfig(layers=1))) == [f"model.layers.1.mlp.{leaf}" for leaf in FFN]


class Stacks(nn.Module):
    """Named lists of blocks with one layer each."""

    def __init__(self, **counts: int) -> None:
        super().__init__()
        for name, count in counts.items():
            setattr(self, name, nn.ModuleList(nn.ModuleDict({"mlp": nn.Linear(2, 2)}) for _ in range(count)))
        self.config = SimpleNamespace(num_hidden_layers=12)


def test_decoder_layers_are_as_many_as_the_config_says() -> None:
    assert decoder_layers(Stacks(mtp=2, layers=12)) == ("layers", 12)
    for unclear in (Stacks(one=12, other=12), Stacks(layers=11)):
        with pytest.raises(ConfigError, match=r"^groups.layers: the layers of Stacks have no clear order"):
            decoder_layers(unclear)


def test_ten_comes_after_nine() -> None:
    model = Stacks(layers=12)
    found = expert_targets(model, GroupsConfig(layers=3))
    assert list(found) == [f"layers.{at}.mlp" for at in (9, 10, 11)]
    assert list(user_targets(found, UsersConfig(layers=2))) == ["layers.10.mlp", "layers.11.mlp"]
