"""Updates: trained on from the version in service, promoted only if better, whatever else happens."""

from __future__ import annotations

import random
import shutil
from collections.abc import Callable, Iterator
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

import proper
from proper.adapters.quantization import decode
from proper.adapters.store import AdapterStore, UserRecord
from proper.api import Model
from proper.config import Config
from proper.data.dataset import Dataset, TextExample
from proper.data.encoder import EncodedExample
from proper.enrolment import worker
from proper.enrolment.comparison import Usual, VersionComparison, outliers, state_of
from proper.enrolment.drift import Drift, by_group, cusum, deviation, usual_of
from proper.enrolment.history import UserHistory, divide
from proper.errors import InputError
from proper.interactions.fit_queue import FitQueue
from proper.layers.batch_context import RowContext
from proper.layers.low_rank import adapter_distance
from proper.run_folder import Stage, Tier
from proper.training.checkpoint import seed_of
from proper.training.jobs import Job
from proper.training.optim import resolve_rate
from proper.training.stages import StageRunner
from tests.training.test_going_on import oracle

HABIT = {"small": "red", "large": "blue", "quiet": "green"}
"""What the user answers to the last word."""
OTHER = {"small": "green", "large": "red", "quiet": "blue"}
OUTLIER = 4.0
"""Standard deviations by which all junk stands out, and few good answers: the tiny backbone is random."""
FIRST = ["old", "new", "loud", "round"]


def lessons(habit: dict[str, str], start: int, count: int) -> list[dict[str, Any]]:
    """Interactions by a habit; no two have the same id."""
    words = list(habit)
    return [
        {
            "id": f"{start + at}",
            "prompt": f"{FIRST[(start + at) % 4]} {words[(start + at) % 3]}",
            "target": habit[words[(start + at) % 3]],
            "timestamp": start + at,
        }
        for at in range(count)
    ]


def permuted(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The same rows with their answers at random."""
    answers = [row["target"] for row in rows]
    random.Random(1).shuffle(answers)
    return [{**row, "target": answer} for row, answer in zip(rows, answers, strict=True)]


def junk(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The same rows with one answer that is none."""
    return [{**row, "target": "round loud round loud round"} for row in rows]


@pytest.fixture(scope="module")
def taught(settings: Config, dataset: Dataset, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small run with a user "new" who has learnt HABIT and has an adapter."""
    folder = tmp_path_factory.mktemp("updates") / "run"
    folder.mkdir()
    stage = {"epochs": 1, "batch_size": 8}
    users = {
        "steps": 60,
        "learning_rate": 1e-2,
        "storage": "fp32",
        "update": settings.users.update.model_copy(update={"outlier": None}),
        "tiers": settings.users.tiers.model_copy(update={"select": False}),
    }
    config = settings.model_copy(
        update={
            "population": settings.population.model_copy(update=stage),
            "groups": settings.groups.model_copy(update=stage),
            "users": settings.users.model_copy(update=users),
            "compute": settings.compute.model_copy(update={"checkpoint_seconds": 1e-9}),
        }
    )
    (folder / "config.yaml").write_text(yaml.safe_dump(config.model_dump()), encoding="utf-8")
    database = Path(dataset.connection.execute("PRAGMA database_list").fetchone()[2])
    shutil.copyfile(database, folder / "data.sqlite")
    StageRunner(config, dataset, folder, 0, [].append).run(tuple(Stage))
    model = proper.load(folder)
    head = model.users.enrol("new", lessons(HABIT, 0, 15))
    model.close()
    assert head is not None and head.tier == "users"
    return folder


def with_update(run: Path, **changed: Any) -> None:
    """Change settings of `users.update` in a run's config."""
    raw = yaml.safe_load((run / "config.yaml").read_text(encoding="utf-8"))
    raw["users"]["update"] |= changed
    (run / "config.yaml").write_text(yaml.safe_dump(raw), encoding="utf-8")


@pytest.fixture
def run(taught: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(taught, tmp_path / "run"))


Open = Callable[[Path], Model]


@pytest.fixture
def opened() -> Iterator[Open]:
    models: list[Model] = []

    def load(folder: Path) -> Model:
        models.append(proper.load(folder))
        return models[-1]

    yield load
    for model in models:
        model.close()


def record(folder: Path, user: str, version: int | None = None) -> UserRecord:
    store = AdapterStore(folder / "users")
    found = store.get(user, version)
    store.close()
    assert found is not None
    return found


def same(one: UserRecord, other: UserRecord) -> bool:
    tensors, others = one.adapter or {}, other.adapter or {}
    return (
        (one.tier, one.facts) == (other.tier, other.facts)
        and one.embedding.equal(other.embedding)
        and tensors.keys() == others.keys()
        and all(tensor.equal(others[name]) for name, tensor in tensors.items())
    )


def example(row: dict[str, Any]) -> TextExample:
    return TextExample(0, "new", row["prompt"], row["target"], None, None, 0)


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
    facts = after.facts["update"]
    assert facts["held_out"] == {"new": 3, "past": 3} and facts["left_out"] == 0
    assert (facts["trained"], facts["replayed"]) == (12, 12) and facts["distance"] > 0
    for name, stored in (("served_loss", before), ("updated_loss", after)):
        held = {"new": came[-3:], "past": lessons(HABIT, 12, 3)}
        measured = {key: loss(model, stored, rows) for key, rows in held.items()}
        assert facts[name] == pytest.approx(measured, rel=1e-3)
    assert facts["updated_loss"]["new"] < facts["served_loss"]["new"]
    assert after.facts["made"] == {"by": "update", "of": 1} and torch.equal(after.embedding, before.embedding)
    assert after.facts["history"] == {"run": 0, "logged": 27}
    (attempt,) = model.users.log.updates.of("", "new")
    assert (attempt.base, attempt.version, attempt.reason) == (1, 2, after.facts["reason"])
    assert attempt.facts == facts and f"{facts['updated_loss']['new']:.3f}" in attempt.reason


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
    facts = record(run, "new").facts
    assert facts["made"]["by"] == "update" and 3 <= facts["update"]["left_out"] < 6
    left_out = facts["history"]["left_out"]
    assert {25, 26, 27} <= set(left_out) and len(left_out) == facts["update"]["left_out"]


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
    slow = oracle(own.model, job, config, rate, after.facts["update"]["passes"], torch.float32)
    found = state_of(own, after).row
    assert found is not None and start.row is not None and after.adapter is not None
    assert decode(after.adapter).keys() == after.adapter.keys()
    assert float((found - slow).norm()) < 1e-2 * float((slow - start.row).norm())


def encoded(model: Model, row: dict[str, Any]) -> EncodedExample:
    return model.personalized.encoder.encode(example(row))


class Killed(BaseException):
    """What a test throws into an update."""


def test_an_update_killed_anywhere_ends_the_same(
    run: Path, opened: Open, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(worker, "TOLD_SECONDS", 0.0)  # the last step is told as well, however fast it is
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
        assert record(folder, "new").facts == record(run, "new").facts
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
            found[user] = (one.tier, one.facts, one.embedding.numpy().tobytes(), tensors, store.versions(user))
    store.close()
    return found


@pytest.mark.parametrize("times", [3, pytest.param(1000, marks=[pytest.mark.slow, pytest.mark.timeout(1800)])])
def test_updates_leave_other_users_bytes_unchanged(run: Path, opened: Open, times: int) -> None:
    before, model = everything(run, "new"), opened(run)
    assert len(before) == 6
    for at in range(times):
        came = lessons((OTHER, HABIT)[at % 2], 27 + 3 * at, 3) if at else lessons(OTHER, 15, 15)
        model.users.update("new", came)
    assert everything(run, "new") == before
    attempts = model.users.log.updates.of("", "new")
    assert len(attempts) == min(times, 20) and len(model.users.versions("new")) == 2


def test_an_update_starts_from_the_version_that_was_rolled_back_to(run: Path, opened: Open) -> None:
    model, came = opened(run), lessons(OTHER, 15, 15)
    model.users.update("new", came)
    assert model.users.rollback("new") == 3
    head, before = model.users.head("new"), record(run, "new", 3)
    assert head is not None and {**before.facts, "made": None} == {**record(run, "new", 3).facts, "made": None}
    assert divide(UserHistory((), 0, 0), before.facts).new == ()
    model.users.update("new")
    newest = model.users.log.updates.of("", "new")[0]
    assert newest.base == 3 and newest.facts["new"] == 15, "all that came since the older version is new to it"
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
    assert attempt.facts == {"logged": 16, "new": 1, "left_out": 0}


def test_numbers_of_another_run_s_log_mean_nothing_after_an_import(run: Path, opened: Open, tmp_path: Path) -> None:
    model = opened(run)
    model.users.update("new", lessons(OTHER, 15, 15))
    model.users.export("new", tmp_path / "new")
    from proper.export.run_export import import_user

    import_user(run, tmp_path / "new", name="twin")
    facts = record(run, "twin").facts
    items = tuple(TextExample(-at, "twin", "a", "b", None, None, 1) for at in (1, 2))
    assert divide(UserHistory(items, 0, 2), facts).new == items


def test_divide_by_the_order_of_arrival() -> None:
    items = tuple(TextExample(number, "ann", "a", "b", None, None, 1) for number in (7, -5, -3, -9, -4))
    grown = UserHistory(items, 1, 4)
    for history, new, left_out in (
        ({}, [-3, -4, -5, -9], []),
        ({"logged": 2}, [-5, -9], []),
        ({"logged": 3, "left_out": [4, 1]}, [], [-9, -3]),
        ({"logged": 4}, [], []),
    ):
        found = divide(grown, {"history": history} if history else {})
        assert [item.id for item in found.new] == new
        assert {item.id for item in found.past} == {item.id for item in items} - {*new, *left_out}


def test_what_is_better() -> None:
    def compared(served: tuple[float, float], updated: tuple[float, float], unknown: float = 9, past: int = 2) -> bool:
        return VersionComparison(2, past, served, updated, unknown).is_better(1.0)

    assert compared((2, 1), (1, 1)) and compared((2, 1), (1, 1.5)) and not compared((2, 1), (1, 2.5))
    assert not compared((2, 1), (2, 0.5)), "the loss on new interactions must fall"
    assert not compared((2, 1), (1, 1), unknown=1), "no better than for an unknown user"
    assert compared((2, 0), (1, 9), past=0) and not compared((2, 1), (float("nan"), 1))


def slow_cusum(losses: list[float], usual: Usual, variance: float, allowance: float) -> float:
    """The definition: the largest sum over a stretch that ends with the last loss, or 0."""
    unit = deviation(usual, variance)
    excess = [min(3.0, max(-3.0, (each - usual.mean) / unit)) - allowance for each in losses]
    return max([0.0, *(sum(excess[at:]) for at in range(len(excess)))])


def test_the_cusum_is_the_largest_sum_to_the_end() -> None:
    draw = random.Random(0)
    for _ in range(200):
        usual = Usual(draw.random(), draw.choice([None, draw.random()]), draw.randint(1, 9))
        losses = [draw.gauss(0.7, 1) for _ in range(draw.randint(0, 12))]
        assert cusum(losses, usual, 0.3, 0.5) == pytest.approx(slow_cusum(losses, usual, 0.3, 0.5), abs=1e-9)
    assert deviation(Usual(0, None, 1), 0.5) == pytest.approx(1.0)
    assert deviation(Usual(0, 0.5, 5), 0.5) == pytest.approx((0.5 * 1.2) ** 0.5)
    assert usual_of({"user_loss": 1.0, "group_loss": 2.0, "held_out": 3, "variance": 0.1}, "groups") == Usual(
        2.0, 0.1, 3
    )
    assert usual_of({}, "users") is None


def test_drift_finds_who_changed_and_updates_them_first(run: Path, opened: Open) -> None:
    model = opened(run)
    users = model.users
    users.enrol("other", [{**row, "id": f"o{row['id']}"} for row in lessons(HABIT, 0, 15)])
    for user in ("new", "other"):  # the first update knows what is usual
        users.update(user, [{**row, "id": f"{user}{row['id']}"} for row in lessons(HABIT, 15, 10)])
    for user, habit in (("new", HABIT), ("other", OTHER)):
        entries = users.entries(user, [{**row, "id": f"{user}-{row['id']}"} for row in lessons(habit, 40, 12)])
        users.log.append("", user, entries)
    found = {drift.user: drift for drift in users.drift()}
    assert [drift.user for drift in users.drift()][0] == "other"
    assert found["other"].drifted and not found["new"].drifted and found["other"].new >= 12
    assert "prompt" not in str([asdict(drift) for drift in found.values()])
    bases = {user: users.versions(user)[0].version for user in ("new", "other")}
    assert [drift.user for drift in users.update_drifted(budget=1)] == ["other"]
    assert users.log.updates.of("", "other")[0].base == bases["other"]
    assert users.versions("new")[0].version == bases["new"]


def test_groups_of_which_many_drift() -> None:
    def drift(user: str, drifted: bool, usual: float | None = 1.0) -> Drift:
        return Drift(user, Tier.USERS, 1, 5, 2.0, usual, 1.0, 9.0, drifted)

    found = [drift(f"a{at}", True) for at in range(4)] + [drift(f"b{at}", at == 0) for at in range(6)]
    main = {each.user: int(each.user[0] == "b") for each in found} | {"odd": 0}
    told = by_group([*found, drift("odd", True, None), drift("new", True)], main)
    assert [(each.group, each.users, each.drifted) for each in told] == [(0, 4, 4), (1, 6, 1)]
    rate = 2 / 8
    assert told[0].chance == pytest.approx(rate**4) and told[1].chance == pytest.approx(1 - (1 - 5 / 6) ** 6)
    assert by_group([], main) == []


def test_a_queue_that_waits_for_drift(run: Path, opened: Open) -> None:
    with_update(run, when="drifted")
    raw = yaml.safe_load((run / "config.yaml").read_text(encoding="utf-8"))
    raw["users"]["drift"]["threshold"] = 1e6
    (run / "config.yaml").write_text(yaml.safe_dump(raw), encoding="utf-8")
    users = opened(run).users
    assert users.enrol("more", [{**row, "id": f"m{row['id']}"} for row in lessons(HABIT, 0, 8)]) is not None
    stored = record(run, "new")
    usual = {"mean": 0.1, "variance": 0.01, "items": 4}
    users.store.put([replace(stored, facts={**stored.facts, "usual": usual})])
    head = users.update("new", lessons(OTHER, 15, 15))
    message = users.log.queue.fit("", "new").message
    assert head is not None and head.version == 2 and message is not None and message.startswith("not drifted: score")
    assert not users.log.updates.of("", "new")
    with pytest.raises(InputError):
        users.update("nobody")


def test_outliers_need_something_to_compare_with(run: Path, opened: Open) -> None:
    model = opened(run)
    assert model.personalized.served is not None
    mean = model.personalized.served.mean
    past = [encoded(model, row) for row in lessons(HABIT, 0, 8)]
    odd = [encoded(model, row) for row in junk(lessons(HABIT, 8, 2))]
    assert outliers(model.personalized, past, [past[0], *odd, past[1]], 4.0, mean) == [1, 2]
    assert outliers(model.personalized, past[:3], odd, 4.0, mean) == []
