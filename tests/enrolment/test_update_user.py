"""Updates: trained on from the version in service, promoted only if better, whatever else happens."""

from __future__ import annotations

import random
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from proper.adapters.quantization import decode
from proper.adapters.store import AdapterStore, UserRecord
from proper.api import Model
from proper.data.histories import TextExample
from proper.enrolment import fit_progress
from proper.enrolment.comparison import VersionComparison, outliers, state_of
from proper.enrolment.history import Divided, UserHistory, divide, hold_out
from proper.interactions.fit_queue import FitQueue
from proper.layers.batch_context import RowContext
from proper.layers.low_rank import adapter_distance
from proper.training.checkpoint import seed_of
from proper.training.jobs import Job
from proper.training.optim import resolve_rate
from tests.enrolment.conftest import Open
from tests.enrolment.lessons import HABIT, OTHER, encoded, example, junk, lessons, permuted, record, same, with_update
from tests.training.test_going_on import oracle

OUTLIER = 4.0
"""Standard deviations by which all junk stands out, and few good answers: the tiny backbone is random."""


@pytest.fixture
def run(taught: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(taught, tmp_path / "run"))


def loss(model: Model, stored: UserRecord, rows: list[dict[str, Any]]) -> float:
    """The loss per token as served, one row at a time."""
    own, total, tokens = model.personalized, 0.0, 0.0
    state = state_of(own, stored)
    assert state.row is not None and own.served is not None
    bank = own.served.bank
    bank.values[0] = state.row
    own.model.use_bank(bank)
    for row in rows:
        item = own.encoder.encode(example(row))
        context = RowContext("users", embedding=stored.embedding.unsqueeze(0), slots=torch.zeros(1, dtype=torch.long))
        with torch.no_grad(), own.model.routing.use(context):
            logits = own.model.backbone.model(input_ids=torch.tensor([item.ids]), use_cache=False).logits
        wanted = torch.tensor(item.ids[item.start :])
        total += float(torch.nn.functional.cross_entropy(logits[0, item.start - 1 : -1], wanted, reduction="sum"))
        tokens += len(wanted)
    return total / tokens


def test_a_change_of_habits_is_promoted_and_is_better_on_what_it_was_not_trained_on(run: Path, opened: Open) -> None:
    model, came = opened(run), lessons(OTHER, 15, 15)
    head = model.users.update("new", came)
    assert head is not None and (head.version, head.tier) == (2, "users")
    before, after = record(run, "new", 1), record(run, "new", 2)
    metrics = after.metadata["update"]
    assert metrics["held_out"] == {"new": 3, "past": 3} and metrics["left_out"] == 0
    assert (metrics["trained"], metrics["replayed"]) == (12, 12) and metrics["distance"] > 0
    for name, stored in (("served_loss", before), ("updated_loss", after)):
        held = {"new": came[-3:], "past": lessons(HABIT, 12, 3)}
        measured = {key: loss(model, stored, rows) for key, rows in held.items()}
        assert metrics[name] == pytest.approx(measured, rel=1e-3)
    assert metrics["updated_loss"]["new"] < metrics["served_loss"]["new"]
    assert after.metadata["made"] == {"by": "update", "of": 1} and torch.equal(after.embedding, before.embedding)
    assert after.metadata["history"] == {"run": 0, "logged": 27}
    (attempt,) = model.users.log.updates.of("", "new")
    assert (attempt.base, attempt.version, attempt.reason) == (1, 2, after.metadata["reason"])
    assert attempt.metrics == metrics and f"{metrics['updated_loss']['new']:.3f}" in attempt.reason


@pytest.mark.parametrize(
    ("poison", "why"),
    [(permuted, "not promoted: "), (junk, "do not fit their inputs")],
    ids=["permuted", "junk"],
)
def test_poisoned_interactions_are_not_promoted(
    run: Path, opened: Open, poison: Callable[[Any], list[dict[str, Any]]], why: str
) -> None:
    with_update(run, outlier=OUTLIER)
    before, model = record(run, "new"), opened(run)
    head = model.users.update("new", poison(lessons(HABIT, 15, 20)))
    assert head is not None and head.version == 1 and same(record(run, "new"), before)
    (attempt,) = model.users.log.updates.of("", "new")
    fit = model.users.log.queue.fit("", "new")
    assert attempt.version is None and why in attempt.reason
    assert (fit.state, fit.version, fit.message) == ("done", 1, f"{attempt.reason}; version 1 stays")


def test_junk_among_good_interactions_is_left_out_for_good(run: Path, opened: Open) -> None:
    with_update(run, outlier=OUTLIER)
    model = opened(run)
    model.users.update("new", [*lessons(OTHER, 15, 9), *junk(lessons(HABIT, 24, 3)), *lessons(OTHER, 27, 6)])
    metadata = record(run, "new").metadata
    assert metadata["made"]["by"] == "update" and 3 <= metadata["update"]["left_out"] < 6
    left_out = metadata["history"]["left_out"]
    assert {25, 26, 27} <= set(left_out) and len(left_out) == metadata["update"]["left_out"]


def test_an_update_is_what_the_slow_oracle_does(run: Path, opened: Open) -> None:
    model, came = opened(run), lessons(OTHER, 15, 15)
    own, config = model.personalized, model.config.users
    past = lessons(HABIT, 0, 12)
    draw = random.Random(seed_of(0, "replay", "new", 1))
    rows = [*(past[at] for at in sorted(draw.sample(range(12), 12))), *came[:12]]
    items = tuple(encoded(model, row) for row in rows)
    start = state_of(own, record(run, "new"))
    layout = own.model.user_layout(config)
    assert start.row is not None
    size = float(adapter_distance(layout.unpack(start.row), None, config.alpha / config.rank))
    job = Job("new", start.embedding, items, epochs=2, start=start.row)
    config = config.model_copy(update={"distance": config.update.distance / size})
    rate = resolve_rate(config.learning_rate, "users", own.model.backbone.hidden_size)
    model.users.update("new", came)
    after = record(run, "new")
    slow = oracle(own.model, job, config, rate, after.metadata["update"]["passes"], torch.float32)
    found = state_of(own, after).row
    assert found is not None and start.row is not None and after.adapter is not None
    assert decode(after.adapter).keys() == after.adapter.keys()
    assert float((found - slow).norm()) < 1e-2 * float((slow - start.row).norm())


class Killed(BaseException):
    """What a test throws into an update."""


def test_an_update_killed_anywhere_ends_the_same(
    run: Path, opened: Open, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fit_progress, "REPORT_SECONDS", 0.0)  # the last step is told as well, however fast it is
    came = lessons(OTHER, 15, 15)
    whole = Path(shutil.copytree(run, tmp_path / "whole"))
    opened(whole).users.update("new", came)
    wanted = record(whole, "new")
    for share in (0.1, 0.6, 1.0):
        folder = Path(shutil.copytree(run, tmp_path / f"killed-{share}"))
        model = opened(folder)

        def kill(phase: str, done: float, share: float = share) -> None:
            if done >= share:
                raise Killed

        with pytest.raises(Killed):
            model.users.update("new", came, kill)
        assert record(folder, "new").metadata == record(run, "new").metadata
        model.users.update("new")
        assert same(record(folder, "new"), wanted)
    # The new version is in the store, and the queue does not know it yet.
    model, done = opened(run), FitQueue.done

    def dies(*_: Any) -> None:
        raise Killed

    monkeypatch.setattr(FitQueue, "done", dies)
    with pytest.raises(Killed):
        model.users.update("new", came)
    monkeypatch.setattr(FitQueue, "done", done)
    assert same(record(run, "new"), wanted)
    model.users.update("new")
    assert [each.version for each in model.users.versions("new")] == [2, 1]
    assert [each.version for each in model.users.log.updates.of("", "new")] == [2]


def everything(folder: Path, but: str) -> dict[str, tuple[Any, ...]]:
    """What the store has of all users but one, to the byte."""
    store = AdapterStore(folder / "users")
    found = {}
    for user, _ in store.users():
        if user != but:
            one = store.get(user)
            assert one is not None
            tensors = {name: tensor.numpy().tobytes() for name, tensor in (one.adapter or {}).items()}
            found[user] = (one.tier, one.metadata, one.embedding.numpy().tobytes(), tensors, store.versions(user))
    store.close()
    return found


@pytest.mark.parametrize("times", [3, pytest.param(1000, marks=[pytest.mark.slow, pytest.mark.timeout(1800)])])
def test_updates_leave_other_users_bytes_unchanged(run: Path, opened: Open, times: int) -> None:
    raw = yaml.safe_load((run / "config.yaml").read_text(encoding="utf-8"))
    raw["compute"]["checkpoint_seconds"] = 30.0  # a checkpoint after every step would take longer than the step
    raw["users"] |= {"batch_size": 8, "update": {**raw["users"]["update"], "steps": 1}}  # gains are not tested here
    (run / "config.yaml").write_text(yaml.safe_dump(raw), encoding="utf-8")
    before, model, promoted = everything(run, "new"), opened(run), 0
    assert len(before) == 6
    for at in range(times):
        came = lessons((OTHER, HABIT)[at % 2], 28 + 2 * at, 2) if at else lessons(OTHER, 15, 15)
        model.users.update("new", came)
        promoted += model.users.log.updates.of("", "new")[0].version is not None
    print(f"{promoted} of {times} updates promoted")
    assert everything(run, "new") == before
    attempts, head = model.users.log.updates.of("", "new"), model.users.head("new")
    assert len(attempts) == min(times, 20) and len(model.users.versions("new")) == 2
    assert head is not None and head.version == 1 + promoted and promoted > times / 20


def test_an_update_starts_from_the_version_that_was_rolled_back_to(run: Path, opened: Open) -> None:
    model, came = opened(run), lessons(OTHER, 15, 15)
    model.users.update("new", came)
    assert model.users.rollback("new") == 3
    head, before = model.users.head("new"), record(run, "new", 3)
    assert head is not None and {**before.metadata, "made": None} == {**record(run, "new", 3).metadata, "made": None}
    assert divide(UserHistory((), 0, 0), before.metadata).new == ()
    model.users.update("new")
    newest = model.users.log.updates.of("", "new")[0]
    assert newest.base == 3 and newest.metrics["new"] == 15, "all that came since the older version is new to it"
    head = model.users.head("new")
    assert head is not None and head.version == (newest.version or 3)


def test_a_rollback_during_an_update_is_not_overwritten(run: Path, opened: Open) -> None:
    model = opened(run)
    model.users.update("new", lessons(OTHER, 15, 15))
    rolled: list[int] = []

    def roll_back(phase: str, done: float) -> None:
        if phase == "update" and not rolled:
            with_store = AdapterStore(run / "users")
            rolled.append(with_store.rollback("new"))
            with_store.close()

    model.users.update("new", lessons(OTHER, 30, 12), roll_back)
    attempts = model.users.log.updates.of("", "new")
    assert rolled == [3] and [each.base for each in attempts] == [3, 1]


def test_one_new_interaction_waits_and_none_changes_nothing(run: Path, opened: Open) -> None:
    users = opened(run).users
    for rows, said in (
        ([], "there is no new interaction; version 1 stays"),
        (lessons(OTHER, 15, 1), "not promoted: one new interaction cannot be both trained on and held out"),
    ):
        head = users.update("new", rows)
        message = users.log.queue.fit("", "new").message
        assert head is not None and head.version == 1 and message is not None and message.startswith(said)
    (attempt,) = users.log.updates.of("", "new")
    assert attempt.metrics == {"logged": 16, "new": 1, "left_out": 0}


def test_numbers_of_another_run_s_log_mean_nothing_after_an_import(run: Path, opened: Open, tmp_path: Path) -> None:
    model = opened(run)
    model.users.update("new", lessons(OTHER, 15, 15))
    model.users.export("new", tmp_path / "new")
    from proper.export.run_export import import_user

    import_user(run, tmp_path / "new", name="twin")
    metadata = record(run, "twin").metadata
    items = tuple(TextExample(-at, "twin", "a", "b", None, None, 1) for at in (1, 2))
    assert divide(UserHistory(items, 0, 2), metadata).new == items


def test_divide_by_the_order_of_arrival() -> None:
    items = tuple(TextExample(number, "ann", "a", "b", None, None, 1) for number in (7, -5, -3, -9, -4))
    grown = UserHistory(items, 1, 4)
    for history, new, left_out in (
        ({}, [-3, -4, -5, -9], []),
        ({"logged": 2}, [-5, -9], []),
        ({"logged": 3, "left_out": [4, 1]}, [], [-9, -3]),
        ({"logged": 4}, [], []),
        ({"logged": 3, "since": 2}, [-9], [-3, 7]),
    ):
        found = divide(grown, {"history": history} if history else {})
        assert [item.id for item in found.new] == new
        assert {item.id for item in found.past} == {item.id for item in items} - {*new, *left_out}


def test_a_fit_anew_holds_out_a_share_of_the_earlier_interactions_too() -> None:
    items = [TextExample(at, "ann", "a", "b", None, None, 1) for at in range(24)]
    divided = Divided(tuple(items[:20]), tuple(items[20:]))
    held = [hold_out(divided, 0.2, anew=anew) for anew in (False, True)]
    assert [(len(each.held_past), len(each.held_new)) for each in held] == [(1, 1), (4, 1)]
    assert all((*each.past, *each.held_past, *each.new, *each.held_new) == tuple(items) for each in held)
    assert hold_out(replace(divided, past=()), 0.2, anew=True).held_past == ()


def test_what_is_better() -> None:
    def compared(served: tuple[float, float], updated: tuple[float, float], unknown: float = 9, past: int = 2) -> bool:
        return VersionComparison(2, past, served, updated, unknown).is_better(1.0)

    assert compared((2, 1), (1, 1)) and compared((2, 1), (1, 1.5)) and not compared((2, 1), (1, 2.5))
    assert not compared((2, 1), (2, 0.5)), "the loss on new interactions must fall"
    assert not compared((2, 1), (1, 1), unknown=1), "no better than for an unknown user"
    assert compared((2, 0), (1, 9), past=0) and not compared((2, 1), (float("nan"), 1))


def test_outliers_need_something_to_compare_with(run: Path, opened: Open) -> None:
    model = opened(run)
    assert model.personalized.served is not None
    mean = model.personalized.served.mean
    past = [encoded(model, row) for row in lessons(HABIT, 0, 8)]
    odd = [encoded(model, row) for row in junk(lessons(HABIT, 8, 2))]
    assert outliers(model.personalized, past, [past[0], *odd, past[1]], 4.0, mean) == [1, 2]
    assert outliers(model.personalized, past[:3], odd, 4.0, mean) == []
