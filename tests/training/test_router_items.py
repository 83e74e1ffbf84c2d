"""Stage 3b on the trials' held-out items: what W_r is trained on, and going on after a kill."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from proper.adapters.store import AdapterStore
from proper.config import UsersConfig
from proper.data.dataset import Dataset
from proper.data.encoder import Encoder
from proper.models.personal import ProperModel
from proper.training.checkpoint import Checkpoint
from proper.training.jobs import Job, held_out_items
from proper.training.lora_router import RouterPlan, train_router
from proper.training.user_stage import UserStage, adapter_of
from proper.training.users import train_users

Build = Callable[..., ProperModel]


class Stopped(Exception):
    """What a test throws into a run."""


def _config(**users: Any) -> UsersConfig:
    base = {"slots": 2, "epochs": 2, "learning_rate": 5e-3, "router": "residual", "router_items": "held-out"}
    return UsersConfig.model_validate(base | users)


def _stage(
    model: ProperModel, config: UsersConfig, dataset: Dataset, encoder: Encoder, folder: Path, stop_at: int | None
) -> UserStage:
    model.add_lora_router(config)
    targets = [user.id for user in dataset.users("target")]
    embeddings = 0.5 * torch.randn(len(targets), 16, generator=torch.Generator().manual_seed(4))
    steps: list[dict[str, Any]] = []

    def log(facts: dict[str, Any]) -> None:
        steps.append(facts)
        if len(steps) == stop_at:
            raise Stopped

    store = AdapterStore(folder / "users")
    return UserStage(model, config, dataset, encoder, targets, embeddings, store, folder / "work", 0, 1e-9, log)


@pytest.mark.parametrize("form", ["raw", "normalized"])
def test_the_router_is_trained_on_items_that_no_trial_adapter_saw(
    grouped: Build, dataset: Dataset, encoder: Encoder, tmp_path: Path, form: str
) -> None:
    config = _config(router_input=form)
    stage = _stage(grouped(), config, dataset, encoder, tmp_path, None)
    found = {name: weight.detach().clone() for name, weight in train_users(stage).router.items()}
    stage.store.close()

    model = grouped()
    model.add_lora_router(config)
    jobs = []
    for at, user in enumerate(stage.users):
        items = [encoder.encode(row) for row in dataset.history(user)]
        held = items[len(items) - held_out_items(len(items), config.tiers.validation) :]
        jobs.append(Job(user, stage.embeddings[at], tuple(held)))
    trials = AdapterStore(tmp_path / "work" / "trial")

    def load(user: str, row: Tensor) -> None:
        model.user_layout(config).pack(adapter_of(trials, user)[0], row)

    rows = sum(len(job.items) for job in jobs)
    slots = min(32, len(jobs))
    plan = RouterPlan(config, stage.rate("router"), 0, 0, slots, rows, Checkpoint(tmp_path / "c", 1e9), lambda _: None)
    train_router(model, jobs, load, plan, "router: trial")
    trials.close()
    for name, weight in model.router_parameters().items():
        assert weight.any() and torch.allclose(found[name], weight, atol=1e-6)


def test_a_killed_run_ends_with_the_same_router(
    grouped: Build, dataset: Dataset, encoder: Encoder, tmp_path: Path
) -> None:
    whole = train_users(_stage(grouped(), _config(), dataset, encoder, tmp_path / "whole", None)).router
    stops = 0
    for stop_at in (3, 9, 14, None):
        stage = _stage(grouped(), _config(), dataset, encoder, tmp_path / "killed", stop_at)
        try:
            again = train_users(stage).router
        except Stopped:
            stops += 1
        finally:
            stage.store.close()
    assert stops >= 2
    assert all(torch.equal(weight, again[name]) for name, weight in whole.items())
