"""The bases of the form `core`, against products and singular vectors of whole matrices."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from proper.adapters.store import AdapterStore
from proper.config import UsersConfig
from proper.data.dataset import Dataset
from proper.data.derived.views import OneHistory
from proper.data.encoder import Encoder
from proper.layers.layout import Layout
from proper.models.personal import ProperModel
from proper.training.bases import decomposed, stacked_bases, train_bases
from proper.training.user_stage import UserStage

SHAPES = {"h.0.up": (6, 5), "h.1.up": (6, 5), "h.0.down": (5, 6)}


@given(users=st.integers(1, 4), rank=st.integers(1, 5), seed=st.integers(0, 2**31))
@settings(max_examples=30)
def test_bases_span_what_the_products_have_in_common(users: int, rank: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    layout = Layout.of(SHAPES, 2)
    adapters = [layout.unpack(torch.randn(layout.width, generator=generator)) for _ in range(users)]

    bases = decomposed(adapters, layout, rank)

    for name, projection, at in (("h.0.up", "h.*.up", 0), ("h.1.up", "h.*.up", 1), ("h.0.down", "h.*.down", 0)):
        down, up = bases[name]
        outputs = up.shape[0]
        assert torch.allclose(down @ down.mT, torch.eye(rank), atol=1e-4)
        assert torch.allclose(up.mT @ up / outputs, torch.eye(rank), atol=1e-4)
        products = [own[f"{projection}.B"][at] @ own[f"{projection}.A"][at] for own in adapters]
        for basis, matrices in ((down, torch.cat(products)), (up.mT / math.sqrt(outputs), torch.cat(products, 1).mT)):
            values = torch.linalg.svdvals(matrices)
            # The best subspace of this size leaves the other singular values.
            left = (matrices - matrices @ basis.mT @ basis).norm()
            assert float(left) == pytest.approx(float(values[rank:].norm()), rel=1e-2, abs=1e-2)


@pytest.fixture
def stage(grouped: Callable[..., ProperModel], dataset: Dataset, encoder: Encoder, tmp_path: Path) -> UserStage:
    users = [user.id for user in dataset.users("target")]
    embeddings = 0.5 * torch.randn(len(users), 16, generator=torch.Generator().manual_seed(4))
    return UserStage(
        model=grouped(),
        config=UsersConfig(form="core", rank=3, steps=4, slots=2, learning_rate=5e-3, storage="int8"),
        dataset=dataset,
        encoder=encoder,
        users=users,
        embeddings=embeddings,
        store=AdapterStore(tmp_path / "users"),
        folder=tmp_path / "work",
        seed=0,
        checkpoint_seconds=1e9,
        log=[].append,
    )


def test_held_out_items_leave_no_trace_in_the_bases(stage: UserStage, dataset: Dataset, tmp_path: Path) -> None:
    """A user's gain is measured on the newest items: bases that know them would make every core look better."""
    user = max(stage.users, key=lambda name: len(dataset.history(name, None)))
    items = dataset.history(user, None)
    found = []
    for number, own in enumerate((items, (*items[:-1], replace(items[-1], target=items[0].target)), items[1:])):
        history = OneHistory(user, own)
        one = replace(
            stage, users=[user], embeddings=stage.embeddings[:1], dataset=history, folder=tmp_path / str(number)
        )
        found.append(stacked_bases(one))
    name = next(iter(found[0]))
    assert items[-1].target != items[0].target
    assert all(torch.equal(*pair) for pair in zip(found[0][name], found[1][name], strict=True))
    assert not torch.allclose(found[0][name][1], found[2][name][1])


def test_without_items_besides_held_out_ones_bases_are_random(stage: UserStage, dataset: Dataset) -> None:
    user = stage.users[0]
    history = OneHistory(user, dataset.history(user, 1))
    one = replace(stage, users=[user], embeddings=stage.embeddings[:1], dataset=history)
    for down, up in stacked_bases(one).values():
        assert torch.allclose(down @ down.mT, torch.eye(3), atol=1e-4) and up.shape[1] == 3


def test_bases_are_trained_once(stage: UserStage, tmp_path: Path) -> None:
    path = tmp_path / "bases.safetensors"
    train_bases(stage, path)
    first: dict[str, tuple[Tensor, Tensor]] = dict(stage.model.bases)
    assert set(first) == {piece.module for piece in stage.model.user_layout(stage.config).pieces}
    before = path.read_bytes()
    train_bases(replace(stage, folder=tmp_path / "other", seed=1), path)
    assert path.read_bytes() == before
    assert all(
        torch.equal(one, other)
        for name in first
        for one, other in zip(first[name], stage.model.bases[name], strict=True)
    )
