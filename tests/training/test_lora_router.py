"""Stage 3b: W_r, trained on frozen adapters of users who come in cohorts."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from proper.config import UsersConfig
from proper.data.batching import collate
from proper.errors import NonFiniteLossError
from proper.layers.batch_context import RowContext
from proper.models.answer_loss import answer_loss
from proper.models.personal import ProperModel
from proper.training import lora_router as router_module
from proper.training.checkpoint import Checkpoint
from proper.training.jobs import Job
from proper.training.lora_router import RouterPlan, train_router

Build = Callable[..., ProperModel]


class Stopped(Exception):
    """What a test throws into a run."""


def adapters(model: ProperModel, jobs: list[Job]) -> dict[str, Tensor]:
    width = model.layout(UsersConfig().rank).width
    generator = torch.Generator().manual_seed(6)
    return {job.user: 0.2 * torch.randn(width, generator=generator) for job in jobs}


def fit(
    model: ProperModel,
    jobs: list[Job],
    folder: Path,
    *,
    slots: int = 2,
    stop_at: int | None = None,
    log: list[dict[str, Any]] | None = None,
    seconds: float = 1e9,
    **users: Any,
) -> dict[str, Tensor]:
    config = UsersConfig(**{"router": "residual", **users})
    if not model.router_parameters():
        model.add_lora_router(config)
    own = adapters(model, jobs)
    before = copy.deepcopy(own)
    steps: list[dict[str, Any]] = [] if log is None else log

    def told(facts: dict[str, Any]) -> None:
        steps.append(facts)
        if len(steps) == stop_at:
            raise Stopped

    rows = sum(len(job.items) for job in jobs) * config.router_epochs
    plan = RouterPlan(config, 5e-3, 0, 0, slots, rows, Checkpoint(folder / "router.checkpoint", seconds), told)
    train_router(model, jobs, lambda user, row: row.copy_(own[user]), plan, "router")
    assert all(torch.equal(own[user], before[user]) for user in own), "adapters are frozen"
    return {name: p.detach().clone() for name, p in model.router_parameters().items()}


@pytest.mark.parametrize("router", ["residual", "paper"])
def test_it_starts_at_zero_and_lowers_the_loss(grouped: Build, jobs: list[Job], tmp_path: Path, router: str) -> None:
    model = grouped()
    group = {name: p.detach().clone() for name, p in model.group_parameters().items()}
    model.add_lora_router(UsersConfig.model_validate({"router": router}))
    for parameter in model.router_parameters().values():
        parameter.data.normal_()
    log: list[dict[str, Any]] = []

    found = fit(model, jobs, tmp_path, slots=5, log=log, router=router, router_epochs=12)

    clean = fit(grouped(), jobs, tmp_path, slots=5, router=router, router_epochs=12)
    assert len(found) == 6 and all(torch.equal(weight, clean[name]) for name, weight in found.items())
    assert all(weight.any() for weight in found.values())
    assert log[-1]["loss"] < log[0]["loss"]
    assert all(torch.equal(p, group[name]) for name, p in model.group_parameters().items()), "only W_r is trained"
    assert not any(p.requires_grad for p in model.router_parameters().values())


def test_the_first_loss_is_that_of_stage_3a(grouped: Build, jobs: list[Job], tmp_path: Path) -> None:
    """With W_r = 0 and the residual form, 3b serves what 3a trained."""
    model, log = grouped(), list[dict[str, Any]]()
    fit(model, jobs[:2], tmp_path, slots=2, log=log)
    own = adapters(model, jobs)
    total = tokens = 0.0
    bank = next(iter(model.layers.values())).bank
    assert bank is not None
    for job in jobs[:2]:
        bank.values[0] = own[job.user]
        batch = collate(job.items, pad=0)
        size = len(job.items)
        rows = RowContext("fit", embedding=job.embedding.expand(size, -1), slots=torch.zeros(size, dtype=torch.long))
        with torch.no_grad():
            sums, counts = answer_loss(model.answer_logits(batch, rows), batch.labels)
        total, tokens = total + float(sums.sum()), tokens + float(counts.sum())
    assert len(log) == 1 and log[0]["loss"] == pytest.approx(total / tokens, rel=1e-4)


@pytest.mark.parametrize("stop_at", [1, 2, 4])
def test_a_resumed_run_gives_the_same_bits(grouped: Build, jobs: list[Job], tmp_path: Path, stop_at: int) -> None:
    whole = fit(grouped(), jobs, tmp_path / "whole", router_epochs=2)
    with pytest.raises(Stopped):
        fit(grouped(), jobs, tmp_path / "cut", router_epochs=2, stop_at=stop_at, seconds=0)
    resumed = fit(grouped(), jobs, tmp_path / "cut", router_epochs=2, seconds=0)
    assert all(torch.equal(resumed[name], whole[name]) for name in whole)


def test_every_row_is_seen_once_per_epoch_with_its_users_adapter(
    grouped: Build, jobs: list[Job], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = grouped()
    model.add_lora_router(UsersConfig(router="residual"))
    own, seen = adapters(model, jobs), []
    loss = router_module._loss

    def watched(model: ProperModel, work: Any, pad: int) -> Tensor:
        bank = next(iter(model.layers.values())).bank
        assert bank is not None
        for slot, job, row in work:
            assert torch.equal(bank.values[slot], own[job.user])
            assert row.user == job.user
            seen.append(row.ids)
        return loss(model, work, pad)

    monkeypatch.setattr(router_module, "_loss", watched)
    fit(model, jobs, tmp_path, slots=2, router_epochs=2)
    assert sorted(seen) == sorted(row.ids for job in jobs for row in job.items for _ in range(2))


def test_a_loss_that_is_not_finite_names_the_step_and_its_users(
    grouped: Build, jobs: list[Job], tmp_path: Path
) -> None:
    model = grouped()
    model.backbone.model.get_output_embeddings().weight.data[5] = float("inf")
    with pytest.raises(NonFiniteLossError, match=r"router: the loss at step 1 is (inf|nan); users: ann, bob$"):
        fit(model, jobs[:2], tmp_path, slots=2)
