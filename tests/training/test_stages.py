"""Three stages into a run folder and out of it again."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from proper.config import Config
from proper.data.dataset import Dataset, prepare
from proper.data.encoder import Encoder
from proper.errors import DataError, ProperError, RunFolderError, StoreError
from proper.files import hash_file, read_json
from proper.inference.generate import respond
from proper.inference.loading import load
from proper.models.checkpoints import load_tensors, save_tensors
from proper.run_folder import Stage
from proper.training.stages import StageRunner


class Stopped(Exception):
    """What a test throws into a run."""


@pytest.fixture(scope="module")
def config(settings: Config) -> Config:
    stage = {"epochs": 1, "batch_size": 8}
    changed = {
        "population": settings.population.model_copy(update=stage),
        "groups": settings.groups.model_copy(update=stage),
        "users": settings.users.model_copy(update={"epochs": 2, "steps": None, "slots": 3, "router": "residual"}),
        "compute": settings.compute.model_copy(update={"checkpoint_seconds": 1e-9}),
    }
    return settings.model_copy(update=changed)


def start(config: Config, dataset: Dataset, folder: Path, log: Callable[[dict[str, Any]], None]) -> StageRunner:
    folder.mkdir(exist_ok=True)
    (folder / "config.yaml").write_text(yaml.safe_dump(config.model_dump()), encoding="utf-8")
    return StageRunner(config, dataset, folder, 0, log)


@pytest.fixture
def runner(config: Config, dataset: Dataset, tmp_path: Path) -> Callable[..., StageRunner]:
    def build(name: str = "run", log: Callable[[dict[str, Any]], None] = [].append) -> StageRunner:
        return start(config, dataset, tmp_path / name, log)

    return build


@pytest.fixture(scope="module")
def whole(config: Config, dataset: Dataset, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run folder with all three stages; tests that change it copy it."""
    folder = tmp_path_factory.mktemp("whole") / "run"
    start(config, dataset, folder, [].append).run(tuple(Stage))
    return folder


def fingerprint(folder: Path) -> dict[str, str]:
    """Hashes of everything that was trained; the manifest is a database, whose bytes follow its history."""
    names = ["population/adapter_model.safetensors", "groups/groups.safetensors", "users/router.safetensors"]
    found = {name: hash_file(folder / name) for name in names}
    blobs = sorted(hash_file(path) for path in (folder / "users" / "blobs").iterdir())
    return found | {str(at): value for at, value in enumerate(blobs)}


def test_all_stages_then_nothing_left_to_do(runner: Callable[..., StageRunner], tmp_path: Path) -> None:
    log: list[dict[str, Any]] = []
    first = runner(log=log.append)
    first.run(tuple(Stage))
    folder = tmp_path / "run"
    assert list(dict.fromkeys(facts["stage"] for facts in log)) == ["population", "groups", "users", "router"]
    for stage in Stage:
        facts = read_json(folder / stage / "stage.json")
        assert facts["seed"] == 0 and facts["seconds"] > 0
        assert not (folder / stage / "stage.checkpoint").exists()
    assert not (folder / "users" / "work").exists()

    before, steps = fingerprint(folder), len(log)
    runner(log=log.append).run(tuple(Stage))
    assert len(log) == steps and fingerprint(folder) == before
    weights, *again = (each.trained_groups().backbone.model.state_dict() for each in (runner(), first, first))
    for theirs in again:
        assert theirs.keys() == weights.keys() and all(torch.equal(theirs[name], weights[name]) for name in weights)

    model = load(folder)
    answers = respond(model, ["red green is"] * 3, ["ann", "nobody", None])
    assert model.stage == "users" and [answer.tier for answer in answers][1:] == ["none", "none"]
    assert answers[0].tier in ("users", "groups")
    model.close()


def test_stages_one_at_a_time_and_killed_in_between_give_the_same_files(
    runner: Callable[..., StageRunner], whole: Path, tmp_path: Path
) -> None:
    for stage in Stage:
        steps: list[dict[str, Any]] = []

        def told(facts: dict[str, Any], steps: list[dict[str, Any]] = steps) -> None:
            steps.append(facts)
            if len(steps) == 3:
                raise Stopped

        with pytest.raises(Stopped):
            runner("cut", told).run([stage])
        assert not (tmp_path / "cut" / stage / "stage.json").exists()
        runner("cut").run([stage])
    assert fingerprint(tmp_path / "cut") == fingerprint(whole)


@pytest.mark.parametrize(("stage", "lacks"), [("groups", "population"), ("users", "population")])
def test_a_stage_needs_the_one_before_it(runner: Callable[..., StageRunner], stage: str, lacks: str) -> None:
    with pytest.raises(RunFolderError, match=f"stage '{lacks}' is not trained yet"):
        runner().run([stage])


def test_groups_trained_again_in_place_are_not_served_with_old_adapters(
    runner: Callable[..., StageRunner], whole: Path, tmp_path: Path
) -> None:
    folder = Path(shutil.copytree(whole, tmp_path / "run"))
    (folder / "groups" / "stage.json").unlink()
    with pytest.raises(RunFolderError, match="users: was trained on groups that no longer exist; delete it too"):
        runner().run(["groups"])
    (folder / "users" / "stage.json").unlink()
    # The same groups come out again, and the adapters are theirs.
    runner().run(tuple(Stage))
    (folder / "users" / "stage.json").unlink()
    tensors, facts = load_tensors(folder / "groups" / "groups.safetensors")
    save_tensors(folder / "groups" / "groups.safetensors", {n: t + 1 for n, t in tensors.items()}, facts)
    with pytest.raises(StoreError, match=r"users: these adapters belong to another groups \("):
        runner().run(tuple(Stage))


def test_groups_are_not_used_on_another_population(
    runner: Callable[..., StageRunner], whole: Path, tmp_path: Path
) -> None:
    folder = Path(shutil.copytree(whole, tmp_path / "run"))
    weights = folder / "population" / "adapter_model.safetensors"
    trained = weights.read_bytes()
    weights.write_bytes(trained[:-1] + bytes([trained[-1] ^ 1]))
    for use in (lambda: load(folder), runner().trained_groups):
        with pytest.raises(ProperError, match="adapter_model.safetensors: damaged, or not the adapter that stage 1"):
            use()
    (folder / "population" / "stage.json").unlink()
    with pytest.raises(RunFolderError, match="groups: was trained on a population that no longer exists; delete it"):
        runner().run(tuple(Stage))
    assert not (folder / "population" / "stage.json").exists()


def test_a_stage_without_rows_is_refused(settings: Config, encoder: Encoder, tmp_path: Path) -> None:
    everybody = settings.model_copy(
        update={
            "split": settings.split.model_copy(update={"target_users": 6}),
            "population": settings.population.model_copy(update={"train_on": "others"}),
        }
    )
    with prepare(everybody, tmp_path / "data.sqlite", encoder.count) as dataset:
        stages = StageRunner(everybody, dataset, tmp_path, 0, lambda _: None)
        with pytest.raises(DataError, match="population.train_on: 'others' selects no rows"):
            stages.run(["population"])
