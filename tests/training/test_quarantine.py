"""A bad user goes into quarantine, with a reason, and changes no other user's numbers."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from proper.config import UsersConfig
from proper.data.encoder import EncodedExample
from proper.models.personal import ProperModel
from proper.training.checkpoint import Checkpoint
from proper.training.jobs import FitResult, Job
from proper.training.multi_user_trainer import MultiUserTrainer

Build = Callable[..., ProperModel]

NAN = torch.full((16,), float("nan"))


def fit(model: ProperModel, jobs: Sequence[Job], folder: Path, slots: int) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Return the adapters, and why the others have none."""
    engine = MultiUserTrainer(model, UsersConfig(batch_size=3, weight_decay=0.1), 5e-3, 0, slots, pad=0)
    rows: dict[str, Tensor] = {}
    reasons: dict[str, str] = {}

    def done(outcomes: Sequence[FitResult], again: bool) -> None:
        for outcome in outcomes:
            if outcome.row is not None:
                rows[outcome.user] = outcome.row
            else:
                assert outcome.reason is not None
                reasons[outcome.user] = outcome.reason

    engine.run(jobs, done, Checkpoint(folder / "engine", 1e9), lambda _: None, "fit")
    return rows, reasons


@pytest.mark.parametrize("slots", [1, 2, 5])
@pytest.mark.parametrize(
    ("spoil", "reason"),
    [
        (lambda job: replace(job, embedding=NAN), "quarantined: the loss is not finite"),
        (lambda job: replace(job, embedding=NAN, held_out=job.items), "quarantined: the held-out loss is not finite"),
        (lambda job: replace(job, items=()), "quarantined: no history"),
        (
            lambda job: replace(job, items=(*job.items, EncodedExample(job.user, tuple(range(3, 303)), 298))),
            "quarantined: a text is longer than the backbone's positions",
        ),
        (
            lambda job: replace(job, items=(EncodedExample(job.user, (5, 6), 0),)),
            "quarantined: an item without a prompt or an answer",
        ),
    ],
    ids=["nan", "held", "empty", "long", "no prompt"],
)
def test_the_others_train_as_if_a_bad_user_had_never_been_there(
    grouped: Build,
    jobs: list[Job],
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    slots: int,
    spoil: Callable[[Job], Job],
    reason: str,
) -> None:
    model = grouped()
    without, none = fit(model, [job for job in jobs if job.user != "bob"], tmp_path / "without", slots)
    bad = [spoil(job) if job.user == "bob" else job for job in jobs]
    rows, reasons = fit(model, bad, tmp_path / "with", slots)
    assert reasons == {"bob": reason} and none == {}
    assert rows.keys() == without.keys()
    for user, row in rows.items():
        assert torch.equal(row, without[user]), f"{user} is another to the bit"
    told = [line for line in caplog.messages if "bob" in line]
    assert len(told) == 1 and reason in told[0]


def test_a_nan_in_a_step_changes_no_other_users_bit(grouped: Build, jobs: list[Job]) -> None:
    """Nor does it reach the shared buffer of gradients in any row but its own."""
    gradients = []
    for embedding in (jobs[1].embedding, NAN):
        work = [replace(job, embedding=embedding) if job.user == "bob" else job for job in jobs]
        engine = MultiUserTrainer(grouped(), UsersConfig(), 5e-3, 0, 5, pad=0)
        engine._fill_slots(work)
        engine._backward({slot: engine.job_in(slot)[0].batch(0, 0, engine.config.batch_size) for slot in range(5)})
        assert engine.bank.gradients is not None
        gradients.append(engine.bank.gradients.clone())
    others = [0, 2, 3, 4]
    assert torch.equal(gradients[0][others], gradients[1][others]) and gradients[0][others].any(1).all()
    assert gradients[1][1].isnan().any() and gradients[0].isfinite().all()


def test_an_adapter_that_is_nan_reaches_no_row_without_one(grouped: Build, jobs: list[Job]) -> None:
    """Rows without an adapter lie beside slot 0's in a batch."""
    engine = MultiUserTrainer(grouped(), UsersConfig(), 5e-3, 0, 2, pad=0)
    bank = engine.bank
    bank.values[0] = float("nan")
    module = next(iter(bank.down))
    x = torch.randn(2, 3, bank.down[module].shape[2])
    middle, own = bank.lora(module, x, torch.tensor([-1, 0]))
    assert not middle[0].any() and not own[0].any() and own[1].isnan().all()


def test_a_user_who_diverges_late_leaves_the_others_within_rounding(
    grouped: Build, jobs: list[Job], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = grouped()
    without, _ = fit(model, [job for job in jobs if job.user != "dan"], tmp_path / "without", 5)
    plain = MultiUserTrainer._backward

    def poisoned(self: MultiUserTrainer, chosen: dict[int, list[EncodedExample]]) -> tuple[dict[int, float], int, int]:
        found = plain(self, chosen)
        assert self.bank.gradients is not None
        for slot in chosen:
            job, state = self.job_in(slot)
            if job.user == "dan" and state.step == 2:
                self.bank.gradients[slot, 7] = float("inf")
        return found

    monkeypatch.setattr(MultiUserTrainer, "_backward", poisoned)
    rows, reasons = fit(model, jobs, tmp_path / "with", 5)
    assert reasons == {"dan": "quarantined: the gradient is not finite"}
    for user, row in rows.items():
        assert float((row - without[user]).norm()) <= 1e-4 * float(without[user].norm())


def test_frozen_weights_get_no_gradients_and_experts_run_once_a_piece(grouped: Build, jobs: list[Job]) -> None:
    model = grouped()
    engine = MultiUserTrainer(model, UsersConfig(), 5e-3, 0, 5, pad=0)
    engine._fill_slots(jobs)
    calls: list[str] = []
    for name, layer in model.layers.items():
        assert layer.experts is not None
        layer.experts.register_forward_hook(lambda *_, name=name: calls.append(name))
    pieces: list[int] = []
    model.backbone.model.register_forward_hook(lambda *_: pieces.append(1))
    facts = engine._step()
    assert facts is not None and facts["users"] == 5
    assert calls == list(model.layers) * len(pieces) and len(pieces) < 5
    parameters = [*model.backbone.model.parameters()]
    assert all(p.grad is None and not p.requires_grad for p in parameters)
    assert facts["tokens"] <= facts["padded"]
