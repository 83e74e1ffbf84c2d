"""Stage 3 as a whole: trial, router, tiers, final, router; and going on after a kill at any step."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from proper.adapters.store import AdapterStore, UserRecord
from proper.config import UsersConfig
from proper.console import no_bar
from proper.data.batching import collate
from proper.data.dataset import Dataset
from proper.data.encoder import Encoder
from proper.files import read_json
from proper.layers.bank import AdapterBank
from proper.layers.batch_context import Mode, RowContext
from proper.models.answer_loss import answer_loss
from proper.models.checkpoints import load_tensors
from proper.models.personal import ProperModel
from proper.training import users as users_module
from proper.training.checkpoint import Checkpoint
from proper.training.jobs import PARTS, FitResult, Job, full_passes, held_out_items, passes_of
from proper.training.multi_user_trainer import MultiUserTrainer
from proper.training.pooled_choice import Choice
from proper.training.user_stage import UserStage
from proper.training.users import train_users
from tests.training.held_out_losses import held_out_losses

Build = Callable[..., ProperModel]
Everything = tuple[dict[str, UserRecord], dict[str, Tensor]]


class Stopped(Exception):
    """What a test throws into a run."""


class Log:
    """Collects steps; throws after `stop_at` of them."""

    def __init__(self, stop_at: int | None = None) -> None:
        self.steps: list[dict[str, Any]] = []
        self.stop_at = stop_at

    def __call__(self, facts: dict[str, Any]) -> None:
        self.steps.append(facts)
        if len(self.steps) == self.stop_at:
            raise Stopped


@pytest.fixture
def run(grouped: Build, dataset: Dataset, encoder: Encoder, tmp_path: Path) -> Iterator[Callable[..., Everything]]:
    stores: list[AdapterStore] = []

    def fit(name: str, log: Callable[[dict[str, Any]], None], spoil: int | None = None, **users: Any) -> Everything:
        config = UsersConfig.model_validate(
            {"slots": 2, "epochs": 3, "learning_rate": 5e-3, "router": "residual"} | users
        )
        model = grouped()
        model.add_lora_router(config)
        targets = [user.id for user in dataset.users("target")]
        store = AdapterStore(tmp_path / name / "users")
        stores.append(store)
        embeddings = 0.5 * torch.randn(len(targets), 16, generator=torch.Generator().manual_seed(4))
        if spoil is not None:
            embeddings[spoil] = float("nan")
        stage = UserStage(
            model=model,
            config=config,
            dataset=dataset,
            encoder=encoder,
            users=targets,
            embeddings=embeddings,
            store=store,
            folder=tmp_path / name / "work",
            seed=0,
            checkpoint_seconds=1e-9,
            log=log,
        )
        router = {name: p.detach().clone() for name, p in train_users(stage).router.items()}
        records = {user: store.get(user) for user, _ in store.users()}
        return {user: record for user, record in records.items() if record is not None}, router

    yield fit
    for store in stores:
        store.close()


def assert_same(one: Everything, other: Everything) -> None:
    assert one[0].keys() == other[0].keys() and one[1].keys() == other[1].keys()
    for user, record in one[0].items():
        again = other[0][user]
        assert (record.tier, record.metadata) == (again.tier, again.metadata)
        assert torch.equal(record.embedding, again.embedding)
        assert (record.adapter is None) == (again.adapter is None)
        for name, tensor in (record.adapter or {}).items():
            assert again.adapter is not None and torch.equal(tensor, again.adapter[name])
    assert all(torch.equal(weight, other[1][name]) for name, weight in one[1].items())


def test_everybody_ends_in_the_store_with_a_reason(run: Callable[..., Everything], dataset: Dataset) -> None:
    log = Log()
    records, router = run("a", log)
    targets = [user.id for user in dataset.users("target")]
    assert sorted(records) == sorted(targets) and len(targets) == 4
    for user, record in records.items():
        assert (record.adapter is not None) == (record.tier == "users")
        assert record.metadata["user"] == user and record.metadata["reason"]
        assert record.metadata["up"] == (record.tier == "users")
        if record.adapter is not None:
            assert {tensor.dtype for tensor in record.adapter.values()} == {torch.bfloat16}
            history = dataset.history(user)
            assert record.metadata["items"] == len(history), "the final adapter is fitted on all items"
    phases = list(dict.fromkeys(facts["phase"] for facts in log.steps))
    assert phases[:2] == ["users: trial", "router: trial"]
    if any(record.tier == "users" for record in records.values()):
        assert phases[2:] == ["users: final", "router: final"] and any(weight.any() for weight in router.values())


def test_a_run_killed_anywhere_ends_in_the_same_bits(run: Callable[..., Everything]) -> None:
    log = Log()
    whole = run("whole", log, tiers={"select": True, "pool_below": 0})
    steps = len(log.steps)
    assert log.steps[-1]["phase"] == "router: final"
    for stop_at in (1, steps // 3, steps // 2, steps - 1):
        name = f"cut{stop_at}"
        with pytest.raises(Stopped):
            run(name, Log(stop_at), tiers={"select": True, "pool_below": 0})
        assert_same(run(name, Log(), tiers={"select": True, "pool_below": 0}), whole)


def test_the_number_of_slots_changes_nothing_but_rounding(run: Callable[..., Everything]) -> None:
    options: dict[str, Any] = {"storage": "fp32", "tiers": {"select": False}, "router": "none"}
    two, four = run("two", Log(), **options)[0], run("four", Log(), slots=4, **options)[0]
    for user, record in two.items():
        other = four[user].adapter
        assert record.adapter is not None and other is not None
        for name, tensor in record.adapter.items():
            assert float((tensor - other[name]).norm()) <= 1e-4 * float(other[name].norm())


def test_without_selection_everybody_gets_an_adapter(run: Callable[..., Everything]) -> None:
    log = Log()
    records, router = run("all", log, tiers={"select": False}, router="none")
    assert {record.tier for record in records.values()} == {"users"} and router == {}
    assert {facts["phase"] for facts in log.steps} == {"users: final"}


@pytest.mark.parametrize("select", [True, False])
def test_a_bad_user_stays_on_the_group_tier_and_harms_nobody(
    run: Callable[..., Everything], dataset: Dataset, caplog: pytest.LogCaptureFixture, select: bool
) -> None:
    bad = [user.id for user in dataset.users("target")][1]
    tiers = {"select": select, "pool_below": 100}
    records, router = run("spoiled", Log(), spoil=1, tiers=tiers)
    assert records[bad].tier == "groups" and records[bad].adapter is None
    assert "not finite" in records[bad].metadata["reason"] and not records[bad].metadata["up"]
    assert sum(f"{bad!r}: quarantined" in line for line in caplog.messages) == 1
    assert all(weight.isfinite().all() for weight in router.values())
    whole, _ = run("whole", Log(), tiers=tiers)
    for user, record in records.items():
        if user != bad and not select:
            assert record.tier == "users" and record.adapter is not None
            other = whole[user].adapter
            assert other is not None
            for name, tensor in record.adapter.items():
                assert float((tensor.float() - other[name].float()).norm()) <= 2e-2 * float(other[name].float().norm())
        if select and user != bad:
            assert "similar users" in record.metadata["reason"], "their neighbours' gains are finite"


def test_rows_are_counted_without_reading_them(
    grouped: Build, dataset: Dataset, encoder: Encoder, tmp_path: Path
) -> None:
    users = [user.id for user in dataset.users("target")]
    store = AdapterStore(tmp_path / "store")
    config = UsersConfig(max_items=5)
    stage = UserStage(
        grouped(), config, dataset, encoder, users, torch.zeros(4, 16), store, tmp_path, 0, 1.0, lambda facts: None
    )
    for trial in (True, False):
        jobs = stage.jobs(range(4), trial)
        assert jobs.rows() == sum(len(jobs[at].items) for at in range(4))
    assert stage.slots == 4, "as many as there are users, where memory allows more"
    store.close()


def test_tiers_follow_from_losses_on_held_out_items_as_served(
    run: Callable[..., Everything], grouped: Build, dataset: Dataset, encoder: Encoder, tmp_path: Path
) -> None:
    hot: dict[str, Any] = {"learning_rate": 0.5, "schedule": "constant", "batch_size": 4, "tiers": {"pool_below": 0}}
    records, _ = run("hot", Log(), **hot)
    model, config = grouped(), UsersConfig(router="residual")
    model.add_lora_router(config)
    bank = AdapterBank(model.layout(config.rank), 1, alpha=config.alpha, trainable=False)
    model.use_bank(bank)
    routers, _ = load_tensors(tmp_path / "hot" / "work" / "trial-router.safetensors")
    for name, parameter in model.router_parameters().items():
        parameter.data.copy_(routers[name])
    trials = AdapterStore(tmp_path / "hot" / "work" / "trial")

    def loss(user: str, mode: Mode) -> float:
        items = [encoder.encode(example) for example in dataset.history(user)]
        sums = tokens = 0.0
        for item in items[len(items) - held_out_items(len(items), config.tiers.validation) :]:
            rows = RowContext(
                mode, embedding=records[user].embedding.unsqueeze(0), slots=torch.zeros(1, dtype=torch.long)
            )
            batch = collate([item], pad=0)
            with torch.no_grad():
                total, count = answer_loss(model.answer_logits(batch, rows), batch.labels)
            sums, tokens = sums + float(total), tokens + float(count)
        return sums / tokens

    for user, record in records.items():
        trial = trials.get(user)
        assert trial is not None and trial.adapter is not None
        bank.layout.pack(trial.adapter, bank.values[0])
        own, group = loss(user, "users"), loss(user, "groups")
        assert record.metadata["user_loss"] == pytest.approx(own, rel=1e-4)
        assert record.metadata["group_loss"] == pytest.approx(group, rel=1e-4)
        assert (record.tier == "users") == (own < group and record.metadata["passes"] > 0)
    trials.close()
    assert {record.tier for record in records.values()} == {"users", "groups"}, "this run shows both"


def test_only_the_newest_items_are_used(run: Callable[..., Everything]) -> None:
    records, _ = run("few", Log(), max_items=3, tiers={"select": False})
    assert {record.metadata["items"] for record in records.values()} == {3}


def test_of_one_item_nothing_can_be_held_out(run: Callable[..., Everything]) -> None:
    records, _ = run("one", Log(), max_items=1)
    assert {record.tier for record in records.values()} == {"groups"}
    assert {record.metadata["reason"] for record in records.values()} == {
        "one item cannot be both trained on and held out"
    }


def test_without_a_router_trials_are_measured_where_the_choice_says(
    run: Callable[..., Everything], grouped: Build, dataset: Dataset, encoder: Encoder, tmp_path: Path
) -> None:
    """The trial's loss is that of the user trained alone on the older items, for the chosen passes, times the scale."""
    options: dict[str, Any] = {"router": "none", "learning_rate": 0.02, "patience": 9, "epochs": 8}
    records, router = run("plain", Log(), **options)
    assert router == {}
    choice = read_json(tmp_path / "plain" / "work" / "trials.json")["choice"]
    config = UsersConfig.model_validate({"slots": 1, **options})
    model = grouped()
    for user, record in records.items():
        items = [encoder.encode(example) for example in dataset.history(user)]
        cut = len(items) - held_out_items(len(items), config.tiers.validation)
        passes = passes_of(8, choice["part"])
        job = Job(user, record.embedding, tuple(items[:cut]), epochs=passes, horizon=8)
        results: list[FitResult] = []
        trainer = MultiUserTrainer(model, config, 0.02, 0, 1, pad=0)
        checkpoint = Checkpoint(tmp_path / f"{user[:3]}.checkpoint", 1e9)
        trainer.run([job], lambda new, _, found=results: found.extend(new), checkpoint, Log(), "alone", no_bar)
        assert results[0].row is not None
        trainer.bank.values[0] = results[0].row
        trainer.bank.scale *= choice["scale"]
        measured = replace(job, held_out=tuple(items[cut:]))
        assert record.metadata["user_loss"] == pytest.approx(
            held_out_losses(model, {0: measured}, "fit", 0)[0], rel=1e-3
        )
        assert record.metadata["group_loss"] == pytest.approx(held_out_losses(model, {0: measured}, "groups", 0)[0])
        assert record.metadata["scale"] == choice["scale"] and record.metadata["held_out"] == len(items) - cut


def test_the_scale_goes_into_the_stored_adapters(run: Callable[..., Everything], monkeypatch: Any) -> None:
    options: dict[str, Any] = {"router": "none", "storage": "fp32", "tiers": {"select": False}}
    whole, _ = run("whole", Log(), **options)
    monkeypatch.setattr(users_module, "ALL_PASSES", Choice(PARTS, 0.5))
    half, _ = run("half", Log(), **options)
    for user, record in whole.items():
        assert record.adapter is not None
        for name, tensor in record.adapter.items():
            other = (half[user].adapter or {})[name]
            assert torch.equal(other, 0.5 * tensor if name.endswith(".B") else tensor)


@given(items=st.integers(1, 200), steps=st.integers(1, 100), batch=st.integers(1, 16))
def test_passes_give_at_least_the_steps_and_fewer_with_one_less(items: int, steps: int, batch: int) -> None:
    full = full_passes(UsersConfig(steps=steps, batch_size=batch), items)
    per_pass = -(-items // batch)
    assert full * per_pass >= steps and (full - 1) * per_pass < max(steps, 1)
    parts = [passes_of(full, part) for part in range(1, PARTS + 1)]
    assert parts == sorted(parts) and parts[0] >= 1 and parts[-1] == full


@given(items=st.integers(2, 500), share=st.floats(0.01, 0.5))
def test_held_out(items: int, share: float) -> None:
    held = held_out_items(items, share)
    assert 1 <= held <= items - 1
    assert held == 1 or held <= items * share + 0.5


def test_adapters_of_absurd_size_are_not_kept(run: Callable[..., Everything], caplog: pytest.LogCaptureFixture) -> None:
    """A learning rate at which numbers grow beyond all reason, and the loss stays finite."""
    records, _ = run("huge", Log(), learning_rate=1e5, tiers={"select": False}, router="none")
    assert records and all(record.tier == "groups" for record in records.values())
    assert {record.metadata["reason"].partition(":")[0] for record in records.values()} == {"quarantined"}
    assert "numbers beyond 10000; the user stays on the group tier" in caplog.text
