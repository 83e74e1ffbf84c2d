"""Fixtures of the training tests, a small run with a user who has learnt a habit, and models that are closed."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import yaml

import proper
from proper.api import Model
from proper.config import Config
from proper.data.dataset import Dataset
from proper.run_folder import Stage
from proper.training.stages import StageRunner
from tests.enrolment.lessons import HABIT, lessons
from tests.training.conftest import dataset, encoder, grouped, settings

__all__ = ["dataset", "encoder", "grouped", "settings"]

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


def train_run(settings: Config, dataset: Dataset, folder: Path, users: dict[str, object]) -> Path:
    """Train all stages in a new folder: one epoch of the shared ones, stage 3 with the settings `users`."""
    folder.mkdir()
    stage = {"epochs": 1, "batch_size": 8}
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
    return folder


@pytest.fixture(scope="session")
def taught(settings: Config, dataset: Dataset, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small run with a user "new" who has learnt HABIT and has an adapter; tests work in copies of it."""
    users = {
        "steps": 60,
        "learning_rate": 1e-2,
        "storage": "fp32",
        "update": settings.users.update.model_copy(update={"outlier": None}),
        "tiers": settings.users.tiers.model_copy(update={"select": False}),
    }
    folder = train_run(settings, dataset, tmp_path_factory.mktemp("updates") / "run", users)
    model = proper.load(folder)
    head = model.users.enrol("new", lessons(HABIT, 0, 15))
    model.close()
    assert head is not None and head.tier == "users"
    return folder
