"""Starts of adapters: the mean product of neighbours' against whole matrices, Reptile, and what a trial measures."""

from __future__ import annotations

from collections.abc import Callable, Sequence
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
from proper.data.encoder import Encoder
from proper.layers.layout import Layout
from proper.models.personal import ProperModel
from proper.training.checkpoint import Checkpoint
from proper.training.jobs import FitResult, fresh
from proper.training.multi_user_trainer import MultiUserTrainer
from proper.training.starts import INNER_STEPS, ROW_NORM, common_start, load_start, mean_adapter, older_adapters
from proper.training.starts import train_start as train
from proper.training.user_stage import UserStage

SHAPES = {"h.0.up": (6, 5), "h.1.up": (6, 5), "h.0.down": (5, 6)}


@given(users=st.integers(1, 3), rank=st.integers(1, 4), seed=st.integers(0, 2**31))
@settings(max_examples=30)
def test_the_mean_adapter_has_the_best_product_of_its_rank(users: int, rank: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    layout = Layout.of(SHAPES, rank)
    adapters = [layout.unpack(torch.randn(layout.width, generator=generator)) for _ in range(users)]

    found = layout.unpack(mean_adapter(adapters, layout))

    for name in ("h.*.up", "h.*.down"):
        mean = torch.stack([own[f"{name}.B"] @ own[f"{name}.A"] for own in adapters]).mean(0)
        u, s, vh = torch.linalg.svd(mean, full_matrices=False)
        best = (u[..., :rank] * s[..., None, :rank]) @ vh[..., :rank, :]
        assert torch.allclose(found[f"{name}.B"] @ found[f"{name}.A"], best, atol=1e-3)
        assert torch.allclose(found[f"{name}.A"].norm(dim=-1), torch.tensor(ROW_NORM), atol=1e-3)


def test_the_mean_of_cores_is_the_mean_of_their_products() -> None:
    layout = Layout.of({"h.0.up": (4, 3)}, 2, {"h.0.up": (torch.randn(2, 4), torch.randn(3, 2))})
    rows = torch.randn(3, layout.width)
    found = layout.factors(mean_adapter([layout.unpack(row) for row in rows], layout))
    products = [layout.factors(row)["h.*.up.B"] @ layout.factors(row)["h.*.up.A"] for row in rows]
    assert torch.allclose(found["h.*.up.B"] @ found["h.*.up.A"], torch.stack(products).mean(0), atol=1e-5)


@pytest.fixture
def stage(grouped: Callable[..., ProperModel], dataset: Dataset, encoder: Encoder, tmp_path: Path) -> UserStage:
    users = [user.id for user in dataset.users("target")]
    return UserStage(
        model=grouped(),
        config=UsersConfig(start="meta", rank=2, steps=4, slots=2, learning_rate=5e-3),
        dataset=dataset,
        encoder=encoder,
        users=users,
        embeddings=0.5 * torch.randn(len(users), 16, generator=torch.Generator().manual_seed(4)),
        store=AdapterStore(tmp_path / "users"),
        folder=tmp_path / "work",
        seed=0,
        checkpoint_seconds=1e9,
        log=[].append,
    )


def test_reptile_by_hand(stage: UserStage, tmp_path: Path) -> None:
    found = train(stage, tmp_path / "start.safetensors")("ann", torch.zeros(16))
    inner = replace(stage, config=stage.config.model_copy(update={"steps": INNER_STEPS}), folder=tmp_path / "slow")
    layout, start = stage.model.user_layout(stage.config), common_start(stage)
    for number, step in enumerate((1, 2 / 3, 1 / 3)):
        rows: list[Tensor] = []
        for adapter in older_adapters(inner, start, str(number)):
            rows.append(torch.cat([adapter[name].flatten() for name in layout.stacks()]))
        assert len(rows) > 2 and not torch.equal(rows[0], rows[1])
        start = (1 - step) * start + step * torch.stack(rows).mean(0)
    assert found is not None
    assert torch.allclose(found, start, atol=1e-6)
    again = load_start(stage.config, tmp_path / "start.safetensors")("bob", torch.zeros(16))
    assert again is not None and torch.equal(again, found)
    assert load_start(stage.config, tmp_path / "nothing.safetensors") is fresh
    assert load_start(UsersConfig(), tmp_path / "start.safetensors") is fresh


def test_a_trial_from_a_start_is_measured_against_the_group_model(stage: UserStage, tmp_path: Path) -> None:
    start = 0.3 * torch.randn(stage.model.user_layout(stage.config).width, generator=torch.Generator().manual_seed(1))

    def trial(starts: Callable[..., Tensor | None], rate: float) -> list[FitResult]:
        found: list[FitResult] = []

        def done(results: Sequence[FitResult], again: bool) -> None:
            found.extend(results)

        one = replace(stage, starts=starts)
        trainer = MultiUserTrainer(one.model, one.config, rate, 0, 2, one.pad)
        checkpoint = Checkpoint(tmp_path / str(rate), 1e9)
        trainer.run(one.jobs(range(len(one.users)), trial=True), done, checkpoint, [].append, "trial")
        return sorted(found, key=lambda result: result.user)

    plain, started = trial(fresh, 5e-3), trial(lambda user, embedding: start, 1e-30)
    for one, other in zip(plain, started, strict=True):
        assert one.state.losses[0] == pytest.approx(other.state.losses[0], rel=1e-5)
        assert one.state.before == [pytest.approx(pair, rel=1e-4) for pair in other.state.before]
        assert other.state.losses[1] != pytest.approx(other.state.losses[0], rel=1e-3), "the start changes answers"
        expected = start if other.state.best else torch.zeros_like(start)
        assert other.row is not None
        assert torch.allclose(other.row, expected, atol=1e-5), (other.state.best, other.state.losses)
