"""Inputs of stage 3 and its two phases of training: adapters (3a) and the LoRA-aware routers (3b).

Each phase leaves a file, so a restart resumes after the last finished phase. A user who cannot be trained (see
`FitResult.reason`) stays on the group tier and is skipped by later phases. Memory per user is an embedding, an id and a
few numbers; histories are read when needed, and adapters go to the `AdapterStore`.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from jaxtyping import Float
from torch import Tensor

from proper.adapters.quantization import encode
from proper.adapters.serialization import fault_of
from proper.adapters.store import AdapterStore, UserRecord
from proper.config import UsersConfig
from proper.console import Bar, progress
from proper.data.batching import RowEncoder
from proper.data.histories import Histories
from proper.files import write_json
from proper.models.checkpoints import fill, load_tensors, save_tensors
from proper.models.memory import device_memory
from proper.models.personal import ProperModel
from proper.run_folder import Tier
from proper.training.checkpoint import Checkpoint
from proper.training.jobs import PARTS, FitResult, HistoryJobs, Starts, fresh
from proper.training.lora_router import RouterPlan, train_router
from proper.training.memory import auto_slots, footprint
from proper.training.metrics_log import Log
from proper.training.multi_user_trainer import MultiUserTrainer
from proper.training.optim import resolve_rate
from proper.training.pooled_choice import Choice
from proper.training.tier_selection import Others, no_others, refused

logger = logging.getLogger(__name__)

ROUTER_USERS = 32
"""Users per cohort in stage 3b. It affects W_r, so unlike `slots` it does not depend on the device's memory."""

Metadata = Callable[[str], Mapping[str, Any]]
"""Function from a user to the metadata of the user's trial."""


def no_metadata(user: str) -> Mapping[str, Any]:
    """Return no metadata."""
    return {}


@dataclass(frozen=True)
class AdapterPhase:
    """One phase of stage 3a: adapters to fit.

    Attributes:
        name: the phase's name, in its files and in the log.
        jobs: the users and their items.
        store: gets the finished adapters.
        metadata: what a user's record says beside the fit.
        scale: factor on the finished adapters.
    """

    name: str
    jobs: HistoryJobs
    store: AdapterStore
    metadata: Metadata = no_metadata
    scale: float = 1.0


@dataclass(frozen=True)
class UserStage:
    """Inputs of stage 3.

    Attributes:
        users: the users to fit, in order.
        embeddings: e_u of these users (U, D); not trained here.
        folder: folder for the phases' files while the stage runs; the caller removes it when all is saved.
        fixed_router: whether W_r is frozen; fitting a new user must not change shared parameters.
        choice: the passes and the scale that an earlier stage 3 chose; None: this one chooses.
        others: users whose trials are known, for pooled decisions; none by default.
        starts: where each user's adapter starts.
        bar: progress bar of the number of users fitted.
        fitting: fits the adapters of a phase in place of this stage, in other processes or together with those of other
            stages; None: `fit_adapters` does it here.
    """

    model: ProperModel
    config: UsersConfig
    dataset: Histories
    encoder: RowEncoder
    users: Sequence[str]
    embeddings: Float[Tensor, "U D"]
    store: AdapterStore
    folder: Path
    seed: int
    checkpoint_seconds: float
    log: Log
    fixed_router: bool = False
    choice: Choice | None = None
    others: Others = no_others
    starts: Starts = fresh
    bar: Bar = progress
    fitting: FitAdapters | None = None

    @property
    def slots(self) -> int:
        """Number of users trained at once."""
        return min(self.most_slots, max(1, len(self.users)))

    @cached_property
    def most_slots(self) -> int:
        """Number of users who can be trained at once: the setting, or what the device's memory allows."""
        if self.config.slots != "auto":
            return self.config.slots
        parts = footprint(self.model, self.config, self.encoder.max_length)
        return auto_slots(parts, device_memory(self.model.device), self.model.device.type)

    @property
    def trial_users(self) -> list[int]:
        """The indices of the users who can have a trial: those with an item to train on and one to hold out."""
        # Two rows of a long history are enough to know.
        most = min(2, self.config.max_items or 2)
        return [at for at, user in enumerate(self.users) if len(self.dataset.history(user, most)) == 2]

    @property
    def pad(self) -> int:
        """Id of the padding token."""
        return self.model.backbone.pad_id

    def rate(self, stage: str) -> float:
        """Return the learning rate of "users" (3a) or "router" (3b)."""
        wanted = self.config.learning_rate if stage == "users" else self.config.router_learning_rate
        return resolve_rate(wanted, stage, self.model.backbone.hidden_size)

    def checkpoint(self, name: str) -> Checkpoint:
        """Return the checkpoint of a phase."""
        return Checkpoint(self.folder / f"{name}.checkpoint", self.checkpoint_seconds)

    def jobs(self, indices: Sequence[int], trial: bool, part: int = PARTS) -> HistoryJobs:
        """Return the jobs of the users at `indices`: trials with held-out items, or on all items, up to `part`."""
        users = [self.users[at] for at in indices]
        embeddings = self.embeddings[list(indices)]
        data = (self.dataset, self.encoder)
        return HistoryJobs(self.config, *data, users, embeddings, trial, part, starts=self.starts)


FitAdapters = Callable[[UserStage, AdapterPhase], None]
"""Type of `fit_adapters`, and of what does its work in other ways (`UserStage.fitting`)."""


def fit_adapters(stage: UserStage, phase: AdapterPhase) -> None:
    """Fit the adapters of a phase; the finished ones are written to its store."""
    jobs, store = phase.jobs, phase.store
    marker = fit_marker(stage.folder, phase.name)
    if marker.exists() or not len(jobs):
        return
    if stage.fitting is not None:
        stage.fitting(stage, phase)
        write_json(marker, {"users": len(jobs)})
        return
    checkpoint = stage.checkpoint(f"{phase.name}-fit")
    saved = checkpoint.metadata()
    slots = stage.slots if saved is None else len(saved["seats"])
    trainer = MultiUserTrainer(stage.model, stage.config, stage.rate("users"), stage.seed, slots, stage.pad)

    def done(results: Sequence[FitResult], again: bool) -> None:
        records = (record_of(stage, phase, result) for result in results)
        store.put(new for new in records if not (again and is_stored(store, new)))

    trainer.run(jobs, done, checkpoint, stage.log, f"users: {phase.name}", stage.bar)
    write_json(marker, {"users": len(jobs)})
    checkpoint.remove()


def record_of(stage: UserStage, phase: AdapterPhase, result: FitResult) -> UserRecord:
    """Return the record of a phase's result: the adapter times its scale, or that of a user in quarantine."""
    user, state, metadata = result.user, result.state, phase.metadata(result.user)
    if result.row is None:
        return refused(stage.embeddings, user, result.embedding, result.reason, metadata)
    tensors = stage.model.user_layout(stage.config).unpack(result.row)
    for name in tensors:
        if name.endswith((".B", ".C")) and phase.scale != 1:
            tensors[name].mul_(phase.scale)
    fault = fault_of(tensors)
    if fault is not None:
        reason = f"quarantined: {fault}"
        warn(user, reason)
        return refused(stage.embeddings, user, result.embedding, reason, metadata)
    adapter = encode(tensors, stage.config.storage)
    fit: dict[str, Any] = {"items": result.items, "passes": state.best, "loss": state.trained}
    if phase.jobs.trial:
        fit |= {"held_losses": state.losses, "before": state.before, "grid": state.grid, "spreads": state.spreads}
    return UserRecord(user, Tier.USERS, result.embedding, adapter, {**metadata, **fit})


def fit_marker(folder: Path, phase: str) -> Path:
    """Return the file that tells that stage 3a of a phase is done."""
    return folder / f"{phase}-fit.json"


def warn(user: str, reason: str) -> None:
    """Log that a user is in quarantine."""
    logger.warning(f"proper: user {user!r}: {reason}; the user stays on the group tier")


def is_stored(store: AdapterStore, record: UserRecord) -> bool:
    """Return whether the store already has exactly this record, written before a kill."""
    stored = store.get(record.user)
    return stored is not None and (stored.tier, stored.metadata) == (record.tier, record.metadata)


def fitted(stage: UserStage, indices: Sequence[int], store: AdapterStore) -> list[int]:
    """Return the users whose adapter is in the store: all but those in quarantine."""
    heads = ((at, store.head(stage.users[at])) for at in indices)
    return [at for at, head in heads if head is not None and head.tier == "users"]


def fit_router(stage: UserStage, jobs: HistoryJobs, store: AdapterStore, phase: str) -> None:
    """Run stage 3b for these jobs; W_r is left in the model."""
    parameters = stage.model.router_parameters()
    path = stage.folder / f"{phase}-router.safetensors"
    if stage.fixed_router or not parameters or not len(jobs):
        return
    if path.exists():
        tensors, _ = load_tensors(path)
        fill(parameters, tensors, path)
        return
    config = stage.config
    checkpoint = stage.checkpoint(f"{phase}-router")
    rows, users = jobs.rows() * config.router_epochs, min(ROUTER_USERS, len(stage.users))
    plan = RouterPlan(config, stage.rate("router"), stage.seed, stage.pad, users, rows, checkpoint, stage.log)
    layout = stage.model.user_layout(config)

    def load(user: str, row: Float[Tensor, "P"]) -> None:
        layout.pack(adapter_of(store, user)[0], row)

    train_router(stage.model, jobs, load, plan, f"router: {phase}")
    save_tensors(path, parameters, {})
    checkpoint.remove()


def adapter_of(store: AdapterStore, user: str) -> tuple[Mapping[str, Tensor], Mapping[str, Any]]:
    """Return the adapter and the metadata of a user who has one."""
    record = store.get(user)
    assert record is not None and record.adapter is not None
    return record.adapter, record.metadata
