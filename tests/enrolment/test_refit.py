"""Updates that fit a user anew: on what is not held out, promoted as measured, decided as in stage 3."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from proper.api import Model
from proper.enrolment import fit_progress
from proper.enrolment.comparison import state_of
from proper.files import read_json, write_json
from proper.layers.bank import AdapterBank
from proper.run_folder import RunFolder, Stage, Tier
from proper.training.checkpoint import seed_of
from proper.training.jobs import Job, full_passes
from proper.training.optim import resolve_rate
from tests.enrolment.conftest import Open
from tests.enrolment.lessons import HABIT, encoded, lessons, record, same
from tests.enrolment.test_update_user import Killed, loss
from tests.training.test_going_on import oracle


@pytest.fixture
def run(taught: Path, tmp_path: Path) -> Path:
    """A run that selects users, in which "new" has lost the adapter."""
    folder = Path(shutil.copytree(taught, tmp_path / "run"))
    raw = yaml.safe_load((folder / "config.yaml").read_text(encoding="utf-8"))
    raw["users"]["tiers"]["select"] = True
    (folder / "config.yaml").write_text(yaml.safe_dump(raw), encoding="utf-8")
    return folder


def without_adapter(model: Model, **metadata: Any) -> Model:
    """Put a version without an adapter into service; metadata of None are left out."""
    stored = model.users.store.get("new")
    assert stored is not None
    changed = {name: each for name, each in {**stored.metadata, **metadata}.items() if each is not None}
    model.users.store.put([replace(stored, tier=Tier.GROUPS, adapter=None, metadata=changed)])
    return model


def test_a_refit_is_what_the_slow_oracle_does_and_is_promoted_as_measured(run: Path, opened: Open) -> None:
    model, came = without_adapter(opened(run)), lessons(HABIT, 15, 15)
    own, config = model.personalized, model.config.users
    head = model.users.update("new", came)
    after = record(run, "new")
    assert head is not None and (head.version, head.tier) == (3, "users") and after.adapter is not None
    assert after.metadata["history"] == {"run": 0, "logged": 27} and after.metadata["made"] == {"by": "update", "of": 2}
    trained = [*lessons(HABIT, 0, 12), *came[:12]]
    held = [*lessons(HABIT, 12, 3), *came[12:]]
    layout = own.model.user_layout(config)
    rate = resolve_rate(config.learning_rate, "users", own.model.backbone.hidden_size)
    start = fresh_row(model)
    passes = full_passes(config, len(trained))
    job = Job("new", after.embedding, tuple(encoded(model, row) for row in trained), epochs=passes, start=start)
    slow = oracle(own.model, job, config, rate, passes, torch.float32)
    found = state_of(own, after).row
    assert found is not None and layout.width == len(found)
    assert float((found - slow).norm()) < 1e-2 * float((slow - start).norm())
    metrics = after.metadata["update"]
    assert metrics["updated_loss"]["new"] == pytest.approx(loss(model, after, came[12:]), rel=1e-3)
    assert after.metadata["user_loss"] == pytest.approx(loss(model, after, held), rel=1e-3)
    assert after.metadata["usual"]["items"] == len(held) and after.metadata["held_out"] == len(held)


def fresh_row(model: Model) -> torch.Tensor:
    """The adapter that the user's training starts from: B is 0."""
    layout = model.personalized.model.user_layout(model.config.users)
    bank = AdapterBank(layout, 1, alpha=model.config.users.alpha, trainable=True)
    bank.fresh(0, torch.Generator().manual_seed(seed_of(0, "adapter", "new")))
    return bank.values[0].clone()


def test_an_adapter_that_does_not_help_is_not_promoted(run: Path, opened: Open) -> None:
    marker = RunFolder(run).marker(Stage.USERS)
    write_json(marker, {**read_json(marker), "choice": {"part": 4, "scale": -1.0}})  # the opposite of what was learnt
    model = without_adapter(opened(run), embedding=None)
    head = model.users.update("new", lessons(HABIT, 15, 15))
    (attempt,) = model.users.log.updates.of("", "new")
    assert head is not None and head.version == 2 and attempt.version is None
    assert attempt.reason.startswith("not promoted: the adapter does not lower the held-out loss")


def test_a_refit_killed_anywhere_ends_the_same(
    run: Path, opened: Open, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fit_progress, "REPORT_SECONDS", 0.0)
    came, phases = lessons(HABIT, 15, 15), list[str]()
    whole = Path(shutil.copytree(run, tmp_path / "whole"))
    without_adapter(opened(whole)).users.update("new", came, lambda phase, _: phases.append(phase))
    wanted = record(whole, "new")
    assert list(dict.fromkeys(phases)) == ["embedding", "update"] and wanted.metadata["embedding"] == "fitted"
    for share in (0.1, 0.7, 1.0):
        folder = Path(shutil.copytree(run, tmp_path / f"killed-{share}"))
        model = without_adapter(opened(folder))

        def kill(phase: str, done: float, share: float = share) -> None:
            if done >= share:
                raise Killed

        with pytest.raises(Killed):
            model.users.update("new", came, kill)
        assert record(folder, "new").metadata == record(folder, "new", 2).metadata
        model.users.update("new")
        assert same(record(folder, "new"), wanted)
