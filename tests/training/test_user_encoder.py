"""The encoder of users: pooling by the formula, users independent of each other, planted users found, and the file."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from proper.data.dataset import Dataset
from proper.data.encoder import EncodedExample, Encoder
from proper.errors import StoreError
from proper.models.checkpoints import load_tensors, save_tensors
from proper.models.personal import ProperModel
from proper.models.user_encoder import Pooling, Readout, UserEncoder, load_encoder, save_encoder
from proper.training.encoder_regression import Regression, UserItems, pool, project, zero_readout
from proper.training.user_encoder import TrainedEmbeddings, train_encoder, without_starts


def planted(users: int, noise: float, seed: int = 0) -> list[UserItems]:
    """Users whose embedding is a linear function of the mean of their phi."""
    draw = torch.Generator().manual_seed(seed)
    weight = torch.randn(8, 6, generator=draw)
    made = []
    for at in range(users):
        own = torch.randn(6, generator=draw)
        phi = own + noise * torch.randn(12, 6, generator=draw)
        added = weight @ own + torch.randn(8, generator=draw)
        made.append(UserItems([EncodedExample(f"u{at}", (1, 2), 1)] * 12, phi, added))
    return made


@given(st.integers(1, 40), st.floats(0.01, 10), st.floats(0.01, 10))
def test_pooling_shrinks_by_the_formula(items: int, between: float, within: float) -> None:
    pooling = Pooling(torch.tensor([0.5, 0.5]), torch.tensor([between, 0.0]), torch.tensor([within, within]))
    z = pooling(torch.tensor([[2.0, 2.0]]), torch.tensor([float(items)]))
    expected = items * between / (items * between + within) * 1.5 / between**0.5
    assert float(z[0, 0]) == pytest.approx(expected, rel=1e-4) and float(z[0, 1]) == 0.0


def test_variances_are_those_that_made_the_items() -> None:
    found = pool([user.phi for user in planted(400, noise=2.0)])
    torch.testing.assert_close(found.within, torch.full((6,), 4.0), rtol=0.15, atol=0)
    torch.testing.assert_close(found.between, torch.full((6,), 1.0), rtol=0.35, atol=0)


@pytest.mark.parametrize("kind", ["ridge", "network"])
def test_planted_users_are_found_better_than_by_the_mean(kind: str) -> None:
    rng = random.Random(0)
    fit = Regression.of(planted(120, noise=0.5), torch.eye(8), rng)
    test = Regression.of(planted(160, noise=0.5)[120:], torch.eye(8), rng, fit.pooling)
    readout = fit.ridge(0.01) if kind == "ridge" else fit.network(0, test)[0]
    assert readout.kind == kind and test.error(readout) < 0.5 * test.error(zero_readout(6, 8))


@pytest.mark.parametrize("kind", ["ridge", "network"])
def test_times_multiplies_the_distance_from_the_mean(kind: str) -> None:
    encoder = made_encoder(kind)
    phi = [encoder.projection(torch.randn(5, 32, generator=torch.Generator().manual_seed(1)))]
    doubled = replace(encoder, readout=encoder.readout.times(2.0))
    distance = encoder.place(phi) - encoder.mean
    torch.testing.assert_close(doubled.place(phi) - encoder.mean, 2 * distance, rtol=1e-4, atol=1e-5)


def test_what_is_left_of_the_starts_is_taken_out() -> None:
    draw = torch.Generator().manual_seed(0)
    starts, added, effect = (torch.randn(n, 8, generator=draw) for n in (500, 500, 12))
    found = without_starts(1.3 * starts + 0.1 * added, starts, range(500), effect)
    torch.testing.assert_close(found, 0.1 * added, rtol=0, atol=0.1)
    alone = without_starts(1.3 * starts, starts, [3], effect)
    torch.testing.assert_close(alone, torch.zeros(500, 8), rtol=0, atol=1e-4)


def made_encoder(kind: str = "ridge") -> UserEncoder:
    draw = torch.Generator().manual_seed(3)
    projection = project(torch.randn(60, 32, generator=draw))
    width = len(projection(torch.zeros(1, 32))[0])
    pooling = Pooling(torch.zeros(width), torch.ones(width), 4 * torch.ones(width))
    first = torch.randn(4 if kind == "ridge" else 5, width, generator=draw)
    hidden = 0 if kind == "ridge" else 5
    readout = Readout(first, torch.ones(hidden), torch.randn(4, hidden, generator=draw))
    return UserEncoder(projection, pooling, readout, torch.randn(4, generator=draw), {"kind": kind})


@pytest.mark.parametrize("kind", ["ridge", "network"])
def test_a_user_is_placed_as_alone_and_the_file_keeps_it(kind: str, tmp_path: Path) -> None:
    encoder, path = made_encoder(kind), tmp_path / "encoder.safetensors"
    draw = torch.Generator().manual_seed(4)
    phi = [encoder.projection(torch.randn(n, 32, generator=draw)) for n in (3, 1, 7)]
    together = encoder.place(phi)
    save_encoder(path, encoder)
    again = load_encoder(path)
    assert again is not None and again.readout.kind == kind and again.metadata == {"kind": kind}
    for own, expected in zip(phi, together, strict=True):
        torch.testing.assert_close(again.place([own])[0], expected, rtol=1e-5, atol=1e-5)
    assert not torch.allclose(together[0], together[1])


def test_a_user_without_items_gets_the_mean() -> None:
    encoder = made_encoder()
    assert torch.equal(encoder.place([torch.zeros(0, len(encoder.pooling.center))])[0], encoder.mean)


def test_a_damaged_file_is_named(tmp_path: Path) -> None:
    path = tmp_path / "encoder.safetensors"
    assert load_encoder(path) is None
    save_encoder(path, made_encoder())
    tensors, facts = load_tensors(path)
    save_tensors(path, {**tensors, "mean": torch.full((4,), torch.nan)}, facts)
    with pytest.raises(StoreError, match=r"encoder.safetensors: mean"):
        load_encoder(path)
    save_tensors(path, {name: tensor for name, tensor in tensors.items() if name != "mean"}, facts)
    with pytest.raises(StoreError, match="the tensor 'mean' is missing"):
        load_encoder(path)


@pytest.mark.parametrize("kind", ["ridge", "network"])
def test_a_tensor_of_another_shape_is_named(kind: str, tmp_path: Path) -> None:
    path = tmp_path / "encoder.safetensors"
    save_encoder(path, made_encoder(kind))
    tensors, metadata = load_tensors(path)
    for name, tensor in tensors.items():
        if tensor.numel() and name not in ("mean", "readout.bias"):
            save_tensors(path, {**tensors, name: tensor[1:]}, metadata)
            with pytest.raises(StoreError, match="encoder.safetensors: the tensor '.*' has the shape"):
                load_encoder(path)
    for name in tensors:
        save_tensors(path, {**tensors, name: torch.zeros(())}, metadata)
        with pytest.raises(StoreError, match="the tensor '.*' has the shape"):
            load_encoder(path)
    for name in ("mean", "readout.bias"):
        save_tensors(path, {**tensors, name: tensors[name][1:] if len(tensors[name]) else torch.ones(3)}, metadata)
        with pytest.raises(StoreError, match="has the shape"):
            load_encoder(path)


def test_few_users_give_no_encoder(grouped: Callable[..., ProperModel], dataset: Dataset, encoder: Encoder) -> None:
    users = [user.id for user in dataset.users() if user.history > 0]
    sample = dataset.sample("all", None, 0)
    trained = TrainedEmbeddings(users, *torch.randn(2, len(users), 16))
    assert train_encoder(grouped(), encoder, sample, trained, 0) is None


def test_users_with_few_items_are_not_held_out(
    grouped: Callable[..., ProperModel],
    dataset: Dataset,
    encoder: Encoder,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """Among many users with one row, none of those held out could be asked anything: every loss was infinite."""
    monkeypatch.setattr("proper.training.user_encoder.MIN_USERS", 2)
    caplog.set_level("INFO", logger="proper")
    rows = list(dataset.sample("all", None, 0).rows(0))
    users = list(dict.fromkeys(row.user for row in rows))
    own = [[row for row in rows if row.user == user] for user in users]
    for full, seed, said in ((2, 3, "answer loss on held-out users: mean "), (1, 0, "1 users with more than 2 rows")):
        few = [row for at, some in enumerate(own) for row in (some if at >= len(own) - full else some[:1])]
        sample = SimpleNamespace(rows=lambda epoch, few=few: iter(few))
        trained = TrainedEmbeddings(users, *torch.randn(2, len(users), 16))
        train_encoder(grouped(), encoder, sample, trained, seed)
        assert said in caplog.messages[-1] and "inf" not in caplog.messages[-1]


def test_the_choice_is_the_lowest_answer_loss_of_held_out_users(
    grouped: Callable[..., ProperModel],
    dataset: Dataset,
    encoder: Encoder,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setattr("proper.training.user_encoder.MIN_USERS", 5)
    caplog.set_level("INFO", logger="proper")
    users = [user.id for user in dataset.users() if user.history > 0]
    kinds = set()
    for seed in range(3):
        embeddings = torch.randn(2, len(users), 16, generator=torch.Generator().manual_seed(seed))
        trained = TrainedEmbeddings(users, *embeddings)
        found = train_encoder(grouped(), encoder, dataset.sample("all", None, 0), trained, seed)
        kind, said = caplog.messages[-1].removeprefix("encoder of users: ").split("; answer loss on held-out users: ")
        losses = [each.rsplit(" ", 1) for each in said.split(", ")]
        assert min(losses, key=lambda pair: float(pair[1]))[0].split(" x ")[0] == kind and len(losses) == 7
        assert (found is None) == (kind == "mean") and (found is None or found.readout.kind == kind)
        kinds.add(kind)
    assert len(kinds) > 1
