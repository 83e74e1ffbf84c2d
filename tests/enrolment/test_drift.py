"""Drift: the score, whom it finds, when an update is due, and the groups of which many drift."""

from __future__ import annotations

import math
import random
import shutil
from contextlib import closing
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from proper.adapters.store import AdapterStore, UserRecord
from proper.enrolment.comparison import Usual
from proper.enrolment.drift import Drift, KnownVariance, by_group, cusum, deviation, usual_of, usual_variance
from proper.enrolment.neighbours import nearest_adapters, nearest_trials
from proper.enrolment.worker import FitWorker
from proper.errors import InputError
from proper.interactions.log import InteractionLog
from proper.run_folder import Tier
from tests.enrolment.conftest import Open
from tests.enrolment.lessons import HABIT, OTHER, lessons, record, with_update


@pytest.fixture
def run(taught: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(taught, tmp_path / "run"))


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


@pytest.mark.parametrize("users", [0, 3, 250])
def test_the_variance_over_users_is_measured_again_for_one_in_a_hundred(tmp_path: Path, users: int) -> None:
    def put(store: AdapterStore, names: list[str], variance: float) -> None:
        metadata = {"usual": {"mean": 1.0, "variance": variance, "items": 3}}
        store.put(UserRecord(name, Tier.GROUPS, torch.zeros(2), None, metadata) for name in names)

    known, told, exact = KnownVariance(), [], []
    with closing(AdapterStore(tmp_path / "users")) as store:
        put(store, [f"u{at}" for at in range(users)], 0.5)
        for at in range(6):
            exact.append(usual_variance(store))
            told.append(known.of(store))
            put(store, [f"u{at}"] if users else [], 9.0)
    every = max(1, users // 100)
    assert told == [exact[at - at % every] for at in range(6)]
    assert users == 0 or len(set(exact)) >= min(users, 6)


BAD_FIGURES: list[dict[str, Any]] = [
    {"items": 5, "group_loss": None, "user_loss": 1.0, "passes": 1, "held_out": 2},  # an export's null for NaN
    {"items": 5, "group_loss": 1.0, "user_loss": 1.0, "passes": 1, "held_out": 2, "spread": math.nan},
    {"items": 5, "group_loss": math.nan, "user_loss": math.nan, "passes": 1, "held_out": 2, "variance": math.nan},
    {"items": [], "group_loss": "x", "user_loss": {}, "passes": None, "held_out": "y", "spread": [], "variance": "z"},
    {"embedding_losses": [1.5, None]},
    {"embedding_losses": 3},
    {"usual": 3},
    {"usual": {"mean": 1.0, "variance": math.nan, "items": 0}},
]


@pytest.mark.parametrize("bad", BAD_FIGURES)
def test_bad_figures_of_one_user_do_not_harm_the_others(tmp_path: Path, bad: dict[str, Any]) -> None:
    good = {"items": 9, "group_loss": 2.0, "user_loss": 1.0, "passes": 1, "held_out": 2, "variance": 0.25}
    with closing(AdapterStore(tmp_path / "users")) as store:
        embedding = torch.ones(2)
        store.put(UserRecord(name, Tier.GROUPS, embedding, None, {**good}) for name in ("ann", "bob"))
        store.put([UserRecord("bad", Tier.GROUPS, embedding, None, bad)])
        assert usual_variance(store) == 0.25
        assert {trial.user for trial, _ in nearest_trials(store, "ann", embedding, 10)} == {"bob"}
        usual = usual_of(bad, Tier.GROUPS)
        assert usual is None or math.isfinite(deviation(usual, 0.25))


def test_a_damaged_neighbour_is_left_out_of_the_start_of_others(tmp_path: Path) -> None:
    with closing(AdapterStore(tmp_path / "users", file_bytes=1)) as store:
        for at, name in enumerate(("ann", "bob")):
            store.put([UserRecord(name, Tier.USERS, torch.ones(2), {"a": torch.full((4,), at + 1.0)}, {})])
        path = store.paths.blobs / str(store.manifest.versions("", b"ann")[0].blob)
        path.write_bytes(bytes(path.stat().st_size))
        (found,) = nearest_adapters(store, "new", torch.ones(2), 5)
        assert torch.equal(found["a"], torch.full((4,), 2.0))


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


def test_a_user_who_is_deleted_meanwhile_does_not_end_the_updates_of_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = [replace(Drift(user, Tier.USERS, 1, 5), drifted=True) for user in ("gone", "here")]
    monkeypatch.setattr(FitWorker, "drift", lambda *_: found)
    monkeypatch.setattr(FitWorker, "fit", lambda *_, **__: None)
    with closing(AdapterStore(tmp_path / "users")) as store, closing(InteractionLog(store.folder)) as log:
        log.tombstones.add("", "gone")
        worker = FitWorker(store.folder, log, lambda: pytest.fail("nobody is fitted"))
        assert worker.update_drifted(store, None, None) == found[1:]


def test_an_update_is_due_for_who_drifted_or_grew_and_not_again_at_once() -> None:
    def due(new: int, drifted: bool, known: int, tried: int) -> bool:
        return replace(Drift("a", Tier.USERS, 1, new), drifted=drifted, known=known, tried=tried).due

    assert due(4, True, 20, 0) and not due(4, False, 20, 0) and due(20, False, 20, 0)
    assert not due(5, True, 20, 4) and due(6, True, 20, 4) and not due(20, False, 20, 14)


def test_groups_of_which_many_drift() -> None:
    def drift(user: str, drifted: bool, usual: float | None = 1.0) -> Drift:
        return Drift(user, Tier.USERS, 1, 5, 2.0, usual, 1.0, 9.0, drifted)

    found = [drift(f"a{at}", True) for at in range(4)] + [drift(f"b{at}", at == 0) for at in range(6)]
    main = {each.user: int(each.user[0] == "b") for each in found} | {"odd": 0}
    told = by_group([*found, drift("odd", True, None), drift("new", True)], main)
    assert [(each.group, each.users, each.drifted) for each in told] == [(0, 4, 4), (1, 6, 1)]
    rate = 2 / 8
    assert told[0].chance == pytest.approx(rate**4) and told[1].chance == pytest.approx(1 - (1 - 5 / 6) ** 6)
    assert [each.together for each in told] == [True, False]
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
    users.store.put([replace(stored, metadata={**stored.metadata, "usual": usual})])
    head = users.update("new", lessons(OTHER, 15, 14))
    message = users.log.queue.fit("", "new").message
    assert head is not None and head.version == 2 and message is not None and message.startswith("not drifted: score")
    assert not users.log.updates.of("", "new")
    users.update("new", lessons(OTHER, 29, 1))
    assert users.log.updates.of("", "new"), "as many are new as the version was trained on"
    with pytest.raises(InputError):
        users.update("nobody")
