"""kill -9 of stage 3 at random points: the end is the same to the bit, and no user in the store is trained again."""

from __future__ import annotations

import os
import random
import signal
import time
import traceback
import warnings
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from proper.adapters.store import AdapterStore
from proper.config import UsersConfig
from proper.data.dataset import Dataset
from proper.data.encoder import Encoder
from proper.models.checkpoints import load_tensors, save_tensors
from proper.models.personal import ProperModel
from proper.training import trials as trials_module
from proper.training import user_stage as stage_module
from proper.training import users as users_module
from proper.training.multi_user_trainer import MultiUserTrainer
from proper.training.user_stage import AdapterPhase, UserStage
from proper.training.users import train_users

Build = Callable[..., ProperModel]
Start = Callable[[Path], int]

CONFIG = UsersConfig.model_validate(
    {"slots": 2, "epochs": 3, "learning_rate": 5e-3, "dropout": 0.1, "router": "residual", "tiers": {"pool_below": 0}}
)


def never_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """Make the engine refuse to train whoever has an adapter in the phase's store."""
    stores: list[AdapterStore] = []
    fit, step = stage_module.fit_adapters, MultiUserTrainer._step

    def watched_fit(stage: UserStage, phase: AdapterPhase) -> None:
        stores.append(phase.store)
        fit(stage, phase)

    def watched_step(self: MultiUserTrainer) -> object:
        for entry in self.slots:
            head = stores[-1].head(entry[0].user) if entry is not None else None
            assert head is None or head.tier == "groups", "a finished user is trained again"
        return step(self)

    for module in (trials_module, users_module):
        monkeypatch.setattr(module, "fit_adapters", watched_fit)
    monkeypatch.setattr(MultiUserTrainer, "_step", watched_step)


@pytest.fixture
def start(grouped: Build, dataset: Dataset, encoder: Encoder, monkeypatch: pytest.MonkeyPatch) -> Start:
    """`start(folder)` runs stage 3 in a process of its own, going on where the folder's last one ended."""
    database = Path(dataset.connection.execute("PRAGMA database_list").fetchone()[2])
    never_again(monkeypatch)

    def work(folder: Path) -> None:
        with Dataset.open(database) as own:
            model = grouped()
            model.add_lora_router(CONFIG)
            users = [user.id for user in own.users("target")]
            store = AdapterStore(folder / "users")
            generator = torch.Generator().manual_seed(4)
            stage = UserStage(
                model=model,
                config=CONFIG,
                dataset=own,
                encoder=encoder,
                users=users,
                embeddings=0.5 * torch.randn(len(users), 16, generator=generator),
                store=store,
                folder=folder / "work",
                seed=0,
                checkpoint_seconds=1e-9,
                log=lambda facts: None,
            )
            save_tensors(folder / "router.safetensors", train_users(stage).router, {})
            store.close()

    def begin(folder: Path) -> int:
        folder.mkdir(exist_ok=True)
        with warnings.catch_warnings():
            # A fork of a process with threads; the child uses one and leaves without cleaning up.
            warnings.simplefilter("ignore", DeprecationWarning)
            child = os.fork()
        if child:
            return child
        try:
            work(folder)
            os._exit(0)
        except BaseException:
            (folder / "error.txt").write_text(traceback.format_exc(), encoding="utf-8")
            os._exit(1)

    return begin


def finish(folder: Path, child: int) -> bool:
    """Wait for the child; return whether it came to its end rather than being killed."""
    _, status = os.waitpid(child, 0)
    if os.WIFSIGNALED(status):
        return False
    assert os.WEXITSTATUS(status) == 0, (folder / "error.txt").read_text(encoding="utf-8")
    return True


def assert_same(one: Path, other: Path) -> None:
    stores = [AdapterStore(folder / "users") for folder in (one, other)]
    try:
        records = [{user: store.get(user) for user, _ in store.users()} for store in stores]
    finally:
        for store in stores:
            store.close()
    assert records[0].keys() == records[1].keys() and records[0]
    for user, record in records[0].items():
        again = records[1][user]
        assert record is not None and again is not None
        assert (record.tier, record.metadata) == (again.tier, again.metadata)
        assert (record.adapter is None) == (again.adapter is None)
        for name, tensor in (record.adapter or {}).items():
            assert again.adapter is not None and torch.equal(tensor, again.adapter[name])
    routers = [load_tensors(folder / "router.safetensors")[0] for folder in (one, other)]
    assert all(torch.equal(weight, routers[1][name]) for name, weight in routers[0].items())


def kill_and_resume(start: Start, tmp_path: Path, kills: int) -> None:
    whole, began = tmp_path / "whole", time.monotonic()
    assert finish(whole, start(whole))
    lasts = time.monotonic() - began
    pick, done, run = random.Random(kills), 0, 0
    while done < kills:
        folder, run = tmp_path / f"cut{run}", run + 1
        ended = False
        while not ended:
            child = start(folder)
            if done < kills:
                time.sleep(pick.uniform(0, 0.7 * lasts))
                os.kill(child, signal.SIGKILL)
            ended = finish(folder, child)
            done += not ended
        assert_same(whole, folder)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_killed_three_times(start: Start, tmp_path: Path) -> None:
    kill_and_resume(start, tmp_path, 3)


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_killed_fifty_times(start: Start, tmp_path: Path) -> None:
    kill_and_resume(start, tmp_path, 50)
