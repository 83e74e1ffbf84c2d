"""Tensors and facts in one file."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from proper.errors import ProperError, StoreError
from proper.models.checkpoints import fill, load_metadata, load_tensors, save_tensors


def test_round_trip(tmp_path: Path) -> None:
    tensors = {"a/b": torch.randn(3, 4).t(), "c": torch.tensor(5), "d": torch.randn(2, requires_grad=True)}
    save_tensors(tmp_path / "x.safetensors", tensors, {"step": 3, "losses": [0.1, 1 / 3]})
    found, facts = load_tensors(tmp_path / "x.safetensors")
    assert found.keys() == tensors.keys() and facts == {"step": 3, "losses": [0.1, 1 / 3]}
    assert all(torch.equal(found[name], tensors[name]) for name in tensors)
    assert [path.name for path in tmp_path.iterdir()] == ["x.safetensors"]


def test_damage_is_named(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    with pytest.raises(ProperError, match="x.safetensors: damaged or unreadable"):
        load_tensors(path)
    save_tensors(path, {"a": torch.ones(100)}, {})
    path.write_bytes(path.read_bytes()[:-10])
    with pytest.raises(ProperError, match="x.safetensors: damaged or unreadable"):
        load_tensors(path)


def test_no_flipped_bit_is_read(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    tensors = {"w": torch.ones(3, dtype=torch.bfloat16), "step": torch.tensor(7), "none": torch.ones(0, 2)}
    save_tensors(path, tensors, {"step": 7})
    whole = path.read_bytes()
    for at in range(8 * len(whole)):
        damaged = bytearray(whole)
        damaged[at // 8] ^= 1 << at % 8
        path.write_bytes(damaged)
        try:
            found, facts = load_tensors(path)
        except ProperError as error:
            assert "x.safetensors: damaged or unreadable" in str(error)
        else:  # the padding
            assert facts == {"step": 7} and found.keys() == tensors.keys(), at
            assert all(torch.equal(found[name], tensors[name]) for name in tensors), at


def test_the_same_content_gives_the_same_bytes(tmp_path: Path) -> None:
    """The users' adapters are bound to the hash of the groups' file."""
    paths = [tmp_path / f"{i}.safetensors" for i in range(20)]
    for path in paths:
        save_tensors(path, {"a": torch.ones(2), "b": torch.zeros(3)}, {"step": 7, "modules": ["q", "v"]})
    assert len({path.read_bytes() for path in paths}) == 1


def test_a_file_without_a_checksum_is_read(tmp_path: Path) -> None:
    save_file({"a": torch.ones(2)}, tmp_path / "x.safetensors", metadata={"facts": '{"step": 1}'})
    assert load_tensors(tmp_path / "x.safetensors")[1] == {"step": 1}
    save_file({"a": torch.ones(2)}, tmp_path / "x.safetensors", metadata={"format": "pt"})
    assert load_tensors(tmp_path / "x.safetensors")[1] == load_metadata(tmp_path / "x.safetensors") == {}


@pytest.mark.parametrize("facts", ["[]", "3", "null", "{", "[" * 100_000, '{"a": ' + "1" * 5_000 + "}"])
def test_facts_that_are_no_object_are_damage(tmp_path: Path, facts: str) -> None:
    path = tmp_path / "x.safetensors"
    save_file({"a": torch.ones(2)}, path, metadata={"facts": facts})
    for load in (load_tensors, load_metadata):
        with pytest.raises(ProperError, match="x.safetensors: damaged or unreadable"):
            load(path)


@pytest.mark.parametrize(
    ("tensors", "said"),
    [
        ({}, "the tensor 'a' is missing"),
        # These two would be copied: PyTorch repeats them.
        ({"a": torch.ones(1)}, r"the tensor 'a' has the shape \[1\], the model has \[2, 3\]"),
        ({"a": torch.ones(3)}, r"the tensor 'a' has the shape \[3\], the model has \[2, 3\]"),
        ({"a": torch.full((2, 3), torch.nan)}, "a: numbers that are not finite"),
    ],
)
def test_only_tensors_of_the_model_s_shapes_are_copied(tensors: dict[str, Tensor], said: str) -> None:
    parameter = nn.Parameter(torch.zeros(2, 3))
    with pytest.raises(StoreError, match=rf"x\.safetensors: {said}"):
        fill({"a": parameter}, tensors, Path("x.safetensors"))
    assert not parameter.any()
