"""A user's state out of one store and into another: exactly, whoever they are, and never where it does not belong."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from proper.adapters.store import UserRecord
from proper.errors import InputError
from proper.export.user_archive import DESCRIPTION, read_user, write_user

ORIGIN = {"backbone": "b", "groups": "g", "rank": "2"}
ODD = ["../../etc/passwd", "a/b\\c", "🦊 𝔘ser", "", ".", "x" * 1000, 'say "hi"\n']


@pytest.fixture
def record(adapter: Callable[[int], dict[str, Tensor]]) -> UserRecord:
    return UserRecord("u", "users", torch.randn(3), adapter(1), {"passes": 2, "reason": "better: ½"})


@pytest.fixture
def folder(tmp_path: Path, record: UserRecord) -> Path:
    place = tmp_path / "out"
    place.mkdir()
    write_user(place, record, {**ORIGIN, "router": "r"})
    return place


@pytest.mark.parametrize("user", ODD)
@pytest.mark.parametrize("kind", [torch.float32, torch.bfloat16])
def test_a_user_comes_back_to_the_last_bit(tmp_path: Path, record: UserRecord, user: str, kind: torch.dtype) -> None:
    assert record.adapter is not None
    adapter = {name: tensor.to(kind) for name, tensor in record.adapter.items()}
    write_user(tmp_path, UserRecord(user, "users", record.embedding, adapter, record.metadata), ORIGIN)
    back, origin = read_user(tmp_path, ORIGIN)
    assert (back.user, back.tier, back.metadata, origin) == (user, "users", record.metadata, ORIGIN)
    assert torch.equal(back.embedding, record.embedding)
    assert back.adapter is not None and back.adapter.keys() == adapter.keys()
    assert all(torch.equal(back.adapter[name], tensor) for name, tensor in adapter.items())
    assert sorted(path.name for path in tmp_path.iterdir()) == [DESCRIPTION, "user.safetensors"]


def test_the_group_tier_has_an_embedding_only(tmp_path: Path) -> None:
    write_user(tmp_path, UserRecord("g", "groups", torch.ones(3), None, {"loss": math.nan}), ORIGIN)
    back, _ = read_user(tmp_path, ORIGIN)
    assert (back.tier, back.adapter, back.metadata) == ("groups", None, {"loss": None})


@pytest.mark.parametrize("key", ORIGIN)
def test_another_origin_is_refused_with_the_part_that_differs(folder: Path, key: str) -> None:
    with pytest.raises(InputError, match=f"belongs to another {key} \\({ORIGIN[key]}, this run's is other\\)"):
        read_user(folder, {**ORIGIN, key: "other"})


def test_what_is_only_told_need_not_be_the_same(folder: Path) -> None:
    assert read_user(folder, ORIGIN)[1]["router"] == "r"


def test_a_flipped_bit_and_a_missing_file_are_named(folder: Path) -> None:
    path = folder / "user.safetensors"
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    with pytest.raises(InputError, match=r"user.safetensors: damaged: its sha256 is not the one in proper.json"):
        read_user(folder, ORIGIN)
    path.unlink()
    with pytest.raises(InputError, match=r"user.safetensors: cannot be read"):
        read_user(folder, ORIGIN)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"format": "proper-peft"}, "proper.json: not an exported user: format: Input should be 'proper-user'"),
        ({"version": 2}, "proper.json: not an exported user: version: Input should be 1"),
        ({"tier": "kings"}, "proper.json: not an exported user: tier"),
        ({"more": 1}, "proper.json: not an exported user: more: Extra inputs are not permitted"),
        ({"tier": "groups"}, "its tensors are not those of a user on the tier 'groups'"),
    ],
)
def test_what_is_no_exported_user_is_named(folder: Path, change: dict[str, Any], message: str) -> None:
    said = json.loads((folder / DESCRIPTION).read_text(encoding="utf-8"))
    (folder / DESCRIPTION).write_text(json.dumps({**said, **change}), encoding="utf-8")
    with pytest.raises(InputError, match=message):
        read_user(folder, ORIGIN)


@pytest.mark.parametrize("bad", [math.nan, -math.inf, 1e30])
def test_numbers_that_would_spoil_answers_are_not_taken_in(tmp_path: Path, record: UserRecord, bad: float) -> None:
    assert record.adapter is not None
    name = list(record.adapter)[-1]
    spoiled = record.adapter[name].clone()
    spoiled.view(-1)[1] = bad
    for odd, place in (
        (replace(record, adapter={**record.adapter, name: spoiled}), name),
        (replace(record, embedding=torch.full_like(record.embedding, bad)), "embedding"),
    ):
        folder = tmp_path / place
        folder.mkdir()
        write_user(folder, odd, ORIGIN)
        with pytest.raises(InputError, match=f"user.safetensors: {place}: numbers (that are not finite|beyond 10000)"):
            read_user(folder, ORIGIN)


@pytest.mark.parametrize(("text", "message"), [("{", "not readable as JSON"), ("[]", "not an exported user: value")])
def test_damaged_facts_are_named(folder: Path, text: str, message: str) -> None:
    (folder / DESCRIPTION).write_text(text)
    with pytest.raises(InputError, match=message):
        read_user(folder, ORIGIN)
    (folder / DESCRIPTION).unlink()
    with pytest.raises(InputError, match=r"not an exported user \(no proper.json\)"):
        read_user(folder, ORIGIN)
