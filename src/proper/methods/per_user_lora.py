"""Per-user LoRA directly on the backbone or on population, without groups and router (OPPU, control `per-user-only`).

Stage 3's trainer fits the users independently of each other. Settings and data determine what is trained.
"""

from __future__ import annotations

import shutil
import time
from pathlib import Path

import torch

from proper.adapters.store import AdapterStore
from proper.config import Config
from proper.data.derived.views import Leaking
from proper.data.histories import Histories
from proper.evaluation.runner import MethodRun
from proper.files import write_json
from proper.inference.model import ServedUsers
from proper.methods.spec import TrainedRun, TrainingWork
from proper.methods.stage_methods import answer_with
from proper.models.backbone import configured_backbone
from proper.models.peft_merge import apply_population
from proper.models.personal import ProperModel
from proper.run_folder import RunFolder, Stage
from proper.training.user_stage import UserStage
from proper.training.users import train_users


def train_per_user(work: TrainingWork) -> None:
    """Train user adapters on the backbone or on population, without groups."""
    _train(work, work.run.dataset)


def train_leaking(work: TrainingWork) -> None:
    """Train as `train_per_user`, with the leak of OPPU's released code: users also train on all earlier users' rows."""
    _train(work, Leaking(work.run.dataset, work.run.config.users.max_items))


def answer_per_user(run: TrainedRun) -> MethodRun:
    """Answer with user adapters directly on the backbone or on population."""
    model = direct_model(run.config, run.folder)
    bank = model.add_bank(run.config.users, max(2, run.config.compute.batch_size))
    return answer_with(run, model, ServedUsers(AdapterStore(RunFolder(run.folder).users.path), bank, torch.zeros(1)))


def _train(work: TrainingWork, histories: Histories) -> None:
    """Fit all users to these histories, resuming where an earlier call stopped; do nothing if all are fitted.

    The adapters are in `users` of the run folder, on the backbone and, if it exists, on the folder's `population`.
    """
    run, folder = work.run, RunFolder(work.run.folder)
    if folder.is_trained(Stage.USERS):
        return
    model = direct_model(run.config, run.folder)
    backbone, started = model.backbone, time.perf_counter()
    users = [user.id for user in histories.users("target") if user.history > 0]
    store = AdapterStore(folder.users.path)
    store.bind({"backbone": backbone.digest, **run.config.users.adapter_shape})
    stage = UserStage(
        model=model,
        config=run.config.users,
        dataset=histories,
        encoder=backbone.encoder(),
        users=users,
        embeddings=torch.zeros(len(users), 1),
        store=store,
        folder=folder.users.work,
        seed=run.seed,
        checkpoint_seconds=run.config.compute.checkpoint_seconds,
        log=work.log,
    )
    with model.caching(run.folder, run.config.compute.cache_mb):
        train_users(stage)
    store.close()
    seconds = round(time.perf_counter() - started, 3)
    metadata = {"users": len(users), "seed": run.seed, "seconds": seconds, "backbone": backbone.digest}
    write_json(folder.marker(Stage.USERS), metadata)
    shutil.rmtree(folder.users.work, ignore_errors=True)


def direct_model(config: Config, folder: Path) -> ProperModel:
    """Return the backbone with the folder's population, if any, and user adapter slots, but without experts."""
    backbone = configured_backbone(config)
    run = RunFolder(folder)
    if run.is_trained(Stage.POPULATION):
        apply_population(backbone, run.population)
    model = ProperModel(backbone)
    model.add_plain_targets(config.groups)
    return model
