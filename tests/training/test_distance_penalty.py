"""Stage 3a with `users.distance`: adapters stay near their anchor, and mixed users are trained as each alone."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from proper.config import UsersConfig
from proper.layers.low_rank import adapter_distance
from proper.models.personal import ProperModel
from proper.training.checkpoint import Checkpoint
from proper.training.jobs import FitResult, Job
from proper.training.multi_user_trainer import MultiUserTrainer

Build = Callable[..., ProperModel]


def _fit(model: ProperModel, jobs: Sequence[Job], folder: Path, slots: int, distance: float) -> dict[str, Tensor]:
    engine = MultiUserTrainer(model, UsersConfig(batch_size=3, distance=distance), 5e-3, 0, slots, pad=0)
    found: dict[str, Tensor] = {}

    def done(results: Sequence[FitResult], again: bool) -> None:
        found.update({result.user: result.row for result in results if result.row is not None})

    engine.run(jobs, done, Checkpoint(folder / f"{slots}-{distance}.checkpoint", 1e9), lambda facts: None, "fit")
    return found


def test_mixed_users_with_the_penalty_are_trained_as_each_alone(
    grouped: Build, jobs: list[Job], tmp_path: Path
) -> None:
    mixed = _fit(grouped(), jobs, tmp_path, 3, 0.5)
    for number, job in enumerate(jobs):
        (tmp_path / str(number)).mkdir()
        alone = _fit(grouped(), [job], tmp_path / str(number), 1, 0.5)[job.user]
        assert float((mixed[job.user] - alone).norm()) < 1e-4 * float(alone.norm())


@pytest.mark.parametrize("anchored", [False, True])
def test_a_penalized_adapter_stays_nearer_to_its_anchor(
    grouped: Build, jobs: list[Job], tmp_path: Path, anchored: bool
) -> None:
    layout = grouped().user_layout(UsersConfig())
    draw = torch.Generator().manual_seed(3)
    if anchored:
        jobs = [replace(job, anchor=0.05 * torch.randn(layout.width, generator=draw)) for job in jobs]
    free, held = (_fit(grouped(), jobs, tmp_path, 5, weight) for weight in (0.0, 5.0))
    for job in jobs:
        to = None if job.anchor is None else layout.unpack(job.anchor)
        far, near = (float(adapter_distance(layout.unpack(rows[job.user]), to)) for rows in (free, held))
        assert near < 0.9 * far
