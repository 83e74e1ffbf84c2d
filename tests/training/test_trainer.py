"""The loop of stages 1 and 2: accumulation, schedules, restarts, and losses that are not finite."""

from __future__ import annotations

import os
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from torch import Tensor

from proper.config import GroupsConfig
from proper.data.dataset import Dataset, Sample
from proper.data.encoder import EncodedExample
from proper.errors import NonFiniteLossError
from proper.models.gradient_checkpointing import gradient_checkpointing
from proper.models.personal import ProperModel
from proper.training import groups
from proper.training.groups import train_groups
from proper.training.optim import rate_factor
from proper.training.trainer import TrainingPlan, _batches, parts_of
from tests.training.conftest import InMemory

Build = Callable[..., ProperModel]
MakePlan = Callable[..., TrainingPlan]
Trained = dict[str, Tensor]


def resident() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


class Stopped(Exception):
    """What a test throws into a run."""


@pytest.fixture
def eight(dataset: Dataset) -> Any:
    """Eight rows of three users, with answers of different lengths."""
    found = [row for user in ("ann", "bob", "çem") for row in dataset.history(user)[:3]][:8]
    return InMemory(tuple(replace(row, target=f"{row.target} " * (1 + at)) for at, row in enumerate(found)))


def settings(**changed: Any) -> GroupsConfig:
    usual = {"user_embedding": 16, "dropout": 0.0, "epochs": 2, "batch_size": 8, "constraint": {"kind": "users"}}
    return GroupsConfig.model_validate(usual | changed)


def groups_of(dataset: Dataset) -> list[str]:
    return [user.id for user in dataset.users()]


def trained(model: ProperModel, embeddings: Tensor) -> Trained:
    return {**{name: p.detach().clone() for name, p in model.group_parameters().items()}, "e": embeddings.clone()}


@pytest.fixture
def run(grouped: Build, plan: MakePlan, dataset: Dataset, accelerator: Accelerator) -> Callable[..., Trained]:
    """Train stage 2 from the same start with some settings; returns what was trained."""

    def fit(config: GroupsConfig, **options: Any) -> Trained:
        model = grouped(dropout=config.dropout)
        made = plan(config, **options)
        return trained(model, train_groups(model, config, groups_of(dataset), made, accelerator))

    return fit


def assert_close(found: Trained, expected: Trained, tolerance: float = 1e-4) -> None:
    for name, tensor in expected.items():
        distance = float((found[name] - tensor).norm() / tensor.norm())
        assert distance <= tolerance, f"{name}: {distance:.1e}"


def test_two_batches_of_four_are_one_of_eight(run: Callable[..., Trained], eight: Sample) -> None:
    quiet = {"kind": "none"}
    whole = run(settings(constraint=quiet, epochs=4), sample=eight, name="whole")
    halves = run(
        settings(constraint=quiet, epochs=4, batch_size=4, gradient_accumulation=2), sample=eight, name="halves"
    )
    assert_close(halves, whole)
    other = run(settings(constraint=quiet, epochs=2, batch_size=4), sample=eight, name="other")
    assert float((other["e"] - whole["e"]).norm() / whole["e"].norm()) > 1e-3, "four steps on half batches differ"


def test_gradient_checkpointing_changes_nothing(run: Callable[..., Trained]) -> None:
    kept = run(settings(dropout=0.1, epochs=1), name="kept")
    again = run(settings(dropout=0.1, epochs=1, gradient_checkpointing=True), name="again")
    assert_close(again, kept, 1e-5)


def test_a_batch_in_parts_has_the_same_gradient(run: Callable[..., Trained], eight: Any) -> None:
    alone = settings(constraint={"kind": "none"}, epochs=3)
    whole = run(alone, sample=eight, name="whole")
    longest = max(row.tokens for row in eight.rows(0))
    for tokens in (3 * longest, 1):
        parts = run(alone, sample=eight, name=f"parts {tokens}", batch_tokens=tokens)
        assert_close(parts, whole, 1e-4)


def test_parts_stay_below_the_limit() -> None:
    rows = [EncodedExample("u", tuple(range(length)), 1) for length in (5, 30, 5, 9, 7, 12)]
    assert parts_of(rows, 180) == [rows], "a batch that fits is not reordered"
    parts = parts_of(rows, 20)
    assert sorted(map(id, (row for part in parts for row in part))) == sorted(map(id, rows))
    assert all(len(part) == 1 or len(part) * max(len(row.ids) for row in part) <= 20 for part in parts)
    assert [[len(row.ids) for row in part] for part in parts] == [[5, 5], [7, 9], [12], [30]]


def test_a_large_batch_with_a_constraint_recomputes_and_changes_nothing(
    run: Callable[..., Trained], monkeypatch: pytest.MonkeyPatch
) -> None:
    kept = run(settings(dropout=0.1, epochs=1), name="kept")
    switched: list[bool] = []

    @contextmanager
    def watched(model: Any, on: bool) -> Iterator[None]:
        switched.append(on)
        with gradient_checkpointing(model, on):
            yield

    monkeypatch.setattr(groups, "gradient_checkpointing", watched)
    assert_close(run(settings(dropout=0.1, epochs=1), name="again", batch_tokens=1), kept, 1e-5)
    assert any(switched)


@pytest.mark.parametrize("accumulation", [1, 3])
def test_a_resumed_run_gives_the_same_bits(run: Callable[..., Trained], accumulation: int) -> None:
    config = settings(dropout=0.1, batch_size=4, gradient_accumulation=accumulation)
    log: list[dict[str, Any]] = []
    whole = run(config, name="whole", log=log)

    def stop_after(steps: int) -> Callable[[dict[str, Any]], None]:
        seen: list[dict[str, Any]] = []

        def told(facts: dict[str, Any]) -> None:
            seen.append(facts)
            if len(seen) == steps:
                raise Stopped

        return told

    again: list[dict[str, Any]] = []
    for steps in (1, 3):
        with pytest.raises(Stopped):
            run(config, name="cut", log=stop_after(steps), seconds=0)
    resumed = run(config, name="cut", log=again, seconds=0)

    assert all(torch.equal(resumed[name], whole[name]) for name in whole)
    strip = [{key: value for key, value in facts.items() if key != "seconds"} for facts in (*log, *again)]
    assert len(again) == len(log) - 2, "a step whose log line was thrown away was not saved and is done again"
    assert strip[len(log) :] == strip[2 : len(log)]


def test_the_seed_is_all_that_is_random(run: Callable[..., Trained]) -> None:
    config = settings(dropout=0.1, epochs=1)
    one = run(config, name="a")
    torch.manual_seed(123)
    same, other = run(config, name="b"), run(config, name="c", seed=1)
    assert all(torch.equal(one[name], same[name]) for name in one)
    assert not any(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.parametrize(
    ("epochs", "batch_size", "accumulation"), [(2, 4, 1), (1.5, 4, 1), (0.3, 8, 2), (3, 7, 4), (1, 100, 3)]
)
def test_epochs_batches_and_updates(
    run: Callable[..., Trained],
    plan: MakePlan,
    dataset: Dataset,
    epochs: float,
    batch_size: int,
    accumulation: int,
) -> None:
    log: list[dict[str, Any]] = []
    config = settings(epochs=epochs, batch_size=batch_size, gradient_accumulation=accumulation, warmup=0.2)
    run(config, log=log)

    rows = dataset.sample("all", None, 0).size
    batches = round(epochs * -(-rows // batch_size))
    assert len(log) == plan(config).updates == max(1, -(-batches // accumulation))
    assert [facts["step"] for facts in log] == list(range(1, len(log) + 1))
    expected = [2e-3 * rate_factor(step, len(log), 0.2, "cosine") for step in range(len(log))]
    assert [facts["learning_rate"] for facts in log] == pytest.approx(expected)
    tokens = dataset.sample("all", None, 0).tokens
    if epochs == int(epochs):
        assert sum(facts["tokens"] for facts in log) == int(epochs) * tokens, "every row once per epoch"


def test_every_users_rows_are_in_an_epoch(plan: MakePlan, dataset: Dataset) -> None:
    batches = _batches(plan(settings(batch_size=4)))
    rows = dataset.sample("all", None, 0).size
    for _ in range(2):
        seen: Counter[int] = Counter()
        while seen.total() < rows:
            seen.update(row.id for row in next(batches))
        assert seen.total() == rows and set(seen.values()) == {1}


def test_a_loss_that_is_not_finite_says_where(
    grouped: Build, plan: MakePlan, dataset: Dataset, accelerator: Accelerator, eight: Sample
) -> None:
    model = grouped()
    model.backbone.model.get_output_embeddings().weight.data[5] = float("inf")
    with pytest.raises(NonFiniteLossError, match=r"^groups: the loss at step 1 is (inf|nan); users: ann, bob, çem$"):
        train_groups(model, settings(), groups_of(dataset), plan(settings(), sample=eight), accelerator)


def test_a_loss_that_stops_being_finite_says_when(
    grouped: Build, plan: MakePlan, dataset: Dataset, accelerator: Accelerator, eight: Sample
) -> None:
    model = grouped()

    def spoil(facts: dict[str, Any]) -> None:
        if facts["step"] == 2:
            next(iter(model.group_parameters().values())).data.fill_(float("nan"))

    made = plan(settings(epochs=4), sample=eight, log=spoil)
    with pytest.raises(NonFiniteLossError, match=r"^groups: the loss at step 3 is nan; users: ann, bob, çem$"):
        train_groups(model, settings(epochs=4), groups_of(dataset), made, accelerator)


def test_a_gradient_that_is_not_finite_spoils_no_weights(
    grouped: Build, plan: MakePlan, dataset: Dataset, accelerator: Accelerator, eight: Sample
) -> None:
    model = grouped()
    weights = next(iter(model.group_parameters().values())).requires_grad_()
    weights.register_hook(lambda gradient: gradient.fill_(float("inf")))
    before, log = weights.detach().clone(), list[dict[str, Any]]()
    with pytest.raises(NonFiniteLossError, match=r"^groups: the gradient's norm at step 1 is inf; users: ann, bob"):
        train_groups(model, settings(), groups_of(dataset), plan(settings(), sample=eight, log=log), accelerator)
    assert torch.equal(weights, before) and not log


def test_losses_fall(run: Callable[..., Trained]) -> None:
    log: list[dict[str, Any]] = []
    run(settings(epochs=8, batch_size=8), log=log)
    assert log[-1]["loss"] < 0.8 * log[0]["loss"]
    assert {"stage", "seed", "penalty", "gradient_norm", "epoch", "seconds"} <= log[0].keys()
    assert log[-1]["epoch"] == 8


@pytest.mark.skipif(sys.platform != "linux", reason="glibc only")
def test_a_checkpoint_gives_freed_memory_back(run: Callable[..., Trained], eight: Any) -> None:
    """Batches of many shapes leave gaps that glibc keeps; here a gap of 100 MB below a piece that is still held."""
    pieces = [bytearray(100_000) for _ in range(1000)]
    held = pieces[-1]
    del pieces
    after_step: list[int] = []
    run(settings(), sample=eight, seconds=0.0, log=lambda _: after_step.append(resident()))
    assert len(held) == 100_000, "held to the end: below it glibc cannot shrink the heap by itself"
    assert after_step[0] - after_step[1] > 50_000_000
