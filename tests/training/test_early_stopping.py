"""Early stopping of stage 1: the held-out rows, the steps at which they are measured, the best weights, kills."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from proper.config import PopulationConfig
from proper.data.batching import Batch, collate
from proper.data.dataset import Dataset
from proper.data.encoder import Encoder
from proper.data.histories import TextExample
from proper.models.answer_loss import answer_logits, answer_loss
from proper.models.backbone import Backbone
from proper.training.early_stopping import MAX_ROWS, MEASUREMENTS, MIN_ROWS, EarlyStopping, hold_out
from proper.training.population import train_population
from proper.training.trainer import TrainingPlan
from tests.training.conftest import InMemory


class Stopped(Exception):
    """What a test throws into a run."""


def sample_of(histories: list[int]) -> InMemory:
    users = [user for user, rows in enumerate(histories) for _ in range(rows)]
    rows = (TextExample(at, f"u{user}", "p", "t", None, None, 3 + at % 5) for at, user in enumerate(users))
    return InMemory(tuple(rows), turns=True)


@given(histories=st.lists(st.integers(1, 60), min_size=1, max_size=40), share=st.floats(0.01, 0.5))
def test_rows_are_held_out_evenly_over_users(histories: list[int], share: float) -> None:
    sample = sample_of(histories)
    rest, held_out = hold_out(sample, share, 6)
    wanted = min(MAX_ROWS, round(share * sample.size))
    if wanted < MIN_ROWS:
        assert held_out == () and rest is sample
        return
    assert len(held_out) == wanted and rest.size == sample.size - wanted
    for epoch in (0, 1):
        left = [row.id for row in rest.rows(epoch)]
        assert left == [row.id for row in sample.rows(epoch) if row not in held_out]
    assert rest.tokens == sample.tokens - sum(min(row.tokens, 6) for row in held_out)
    taken = Counter(row.user for row in held_out)
    most = max(taken.values())
    for user, rows in enumerate(histories):
        # Limits double: a user with rows left has given at least half as many as any other user.
        assert taken[f"u{user}"] == rows or 2 * taken[f"u{user}"] >= most - 1


def stopping_with(losses: list[float], patience: int) -> tuple[EarlyStopping, nn.Parameter]:
    found = iter(losses)
    stopping = EarlyStopping((), patience, 0, lambda batch: (torch.zeros(()), torch.zeros(())))
    stopping._loss = lambda accelerator: next(found)  # type: ignore[method-assign]
    return stopping, nn.Parameter(torch.zeros(1))


@given(losses=st.lists(st.sampled_from([0.1, 0.2, 0.3, 0.4, 0.5]), min_size=1, max_size=12), patience=st.integers(1, 4))
def test_training_ends_after_measurements_without_a_lower_loss(losses: list[float], patience: int) -> None:
    stopping, parameter = stopping_with(losses, patience)
    accelerator = Accelerator(cpu=True)
    for at, loss in enumerate(losses):
        parameter.data.fill_(at)
        stopping.measure({"p": parameter}, accelerator)
        seen = losses[: at + 1]
        lowest = max(i for i in range(len(seen)) if seen[i] == min(seen))
        assert stopping.is_over == (at - lowest >= patience) and loss == losses[at]
        assert float(stopping.best["p"]) == lowest
        if stopping.is_over:
            break
    stopping.restore_best({"p": parameter})
    assert float(parameter.detach()) == lowest


@pytest.mark.parametrize("updates", [1, 3, 9, 10, 25, 400])
def test_measured_about_ten_times_and_at_the_end(updates: int) -> None:
    stopping, _ = stopping_with([], 1)
    due = [step for step in range(1, updates + 1) if stopping.is_due(step, updates)]
    assert due[-1] == updates and len(due) <= 2 * MEASUREMENTS


Fit = Callable[..., tuple[Backbone, list[dict[str, Any]]]]


@pytest.fixture
def fit(
    backbone: Callable[..., Backbone],
    plan: Callable[..., TrainingPlan],
    accelerator: Accelerator,
    dataset: Dataset,
    tmp_path: Path,
) -> Fit:
    held_out = tuple(row for user in ("ann", "bob", "eve") for row in dataset.history(user)[:2])

    def run(name: str, stop_at: int | None = None, **changed: Any) -> tuple[Backbone, list[dict[str, Any]]]:
        steps: list[dict[str, Any]] = []

        def log(facts: dict[str, Any]) -> None:
            steps.append(facts)
            if len(steps) == stop_at:
                raise Stopped

        options = {"epochs": 10, "batch_size": 8, "rank": 4, "alpha": 64, "dropout": 0.1, "patience": 2}
        config = PopulationConfig.model_validate(options | changed)
        made = backbone()
        train_population(made, config, plan(config, log=log, seconds=0, name=name), held_out, accelerator, tmp_path)
        return made, steps

    return run


def loss_of(model: Backbone, encoder: Encoder, dataset: Dataset) -> float:
    rows = [encoder.encode(row) for user in ("ann", "bob", "eve") for row in dataset.history(user)[:2]]
    batch: Batch = collate(rows, 0)
    with torch.no_grad():
        total, tokens = answer_loss(answer_logits(model.model, batch), batch.labels)
    return float(total.sum() / tokens.sum())


def test_the_model_is_the_one_with_the_lowest_held_out_loss(fit: Fit, encoder: Encoder, dataset: Dataset) -> None:
    made, steps = fit("whole")
    losses = [step["held_out_loss"] for step in steps if "held_out_loss" in step]
    assert len(losses) >= 3 and loss_of(made, encoder, dataset) == pytest.approx(min(losses), abs=1e-5)


def test_a_resumed_run_gives_the_same_bits_and_ends_at_the_same_step(fit: Fit) -> None:
    whole, steps = fit("whole")
    for stop_at in (1, len(steps) // 2, len(steps) - 1):
        with pytest.raises(Stopped):
            fit(f"cut{stop_at}", stop_at)
        resumed, rest = fit(f"cut{stop_at}")
        assert rest[-1]["step"] == steps[-1]["step"]
        same: list[tuple[Tensor, Tensor]] = list(zip(resumed.model.parameters(), whole.model.parameters(), strict=True))
        assert all(torch.equal(one, other) for one, other in same)


def test_training_ends_early_where_the_loss_rises(fit: Fit) -> None:
    _, steps = fit("high", alpha=2000, epochs=20, patience=1)
    losses = [step["held_out_loss"] for step in steps if "held_out_loss" in step]
    assert len(losses) < MEASUREMENTS and losses[-1] > min(losses)


@pytest.mark.parametrize("accumulation", [1, 2])
def test_the_first_pass_is_never_cut(fit: Fit, accumulation: int) -> None:
    options = {"alpha": 2000, "batch_size": 1, "gradient_accumulation": accumulation}
    _, whole = fit("whole", epochs=1, patience=0, **options)
    _, one = fit("one", epochs=1, patience=1, **options)
    losses = [step["held_out_loss"] for step in one if "held_out_loss" in step]
    assert any(later > earlier for earlier, later in pairwise(losses[:-1]))
    assert [step["step"] for step in one] == [step["step"] for step in whole]
    _, many = fit("many", epochs=20, patience=1, **options)
    assert len(whole) <= len(many) < 20 * len(whole)


def test_patience_0_measures_nothing(fit: Fit) -> None:
    assert not any("held_out_loss" in step for step in fit("all", patience=0, epochs=1)[1])
