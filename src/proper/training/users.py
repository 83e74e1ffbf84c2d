"""Stage 3 training: a LoRA adapter per user who gains from one, then the LoRA-aware router (method: stage 3, tiers).

    1. trial:  every user's adapter on the older part of the history, with early stopping on the held-out items
    2. 3b on the trial adapters, because users are served in that form
    3. tiers:  select the users whose loss is lower with the adapter than on the group tier
    4. final:  the adapters of the selected users, on all their items, for the best number of passes
    5. 3b on the final adapters

Each phase leaves a file, so a restart resumes after the last finished phase. A user who cannot be trained (see
`FitResult.reason`) stays on the group tier and is skipped by later phases. Memory per user is an embedding, an id and a
few numbers; histories are read when needed, and adapters go to the `AdapterStore`.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from proper.adapters.quantization import encode
from proper.adapters.serialization import fault_of
from proper.adapters.store import AdapterStore, UserRecord
from proper.config import UsersConfig
from proper.console import Bar, progress
from proper.data.derived.views import Histories
from proper.data.encoder import Encoder
from proper.files import private_folder, read_json, write_json
from proper.layers.bank import AdapterBank
from proper.models.checkpoints import load_tensors, save_tensors
from proper.models.personal import ProperModel
from proper.run_folder import Tier
from proper.training.checkpoint import Checkpoint
from proper.training.jobs import FitResult, HistoryJobs, refusal
from proper.training.lora_router import RouterPlan, train_router
from proper.training.memory import auto_slots, device_memory, footprint
from proper.training.microbatching import held_out_losses
from proper.training.multi_user_trainer import MultiUserTrainer
from proper.training.optim import resolve_rate
from proper.training.tier_selection import Others, Trial, decide, no_others, refused, storable
from proper.training.trainer import Log

logger = logging.getLogger(__name__)

ROUTER_USERS = 32
"""Users per cohort in stage 3b. It affects W_r, so unlike `slots` it does not depend on the device's memory."""

RECORDS = 1000
"""Number of records per put for users who were not trained."""


@dataclass(frozen=True)
class UserStage:
    """Inputs of stage 3.

    Attributes:
        users: the users to fit, in order.
        embeddings: e_u of these users (U, D); not trained here.
        folder: folder for the phases' files while the stage runs; the caller removes it when all is saved.
        fixed_router: whether W_r is frozen; fitting a new user must not change shared parameters.
        others: users whose trials are known, for pooled decisions; none by default.
        bar: progress bar of the number of users fitted.
    """

    model: ProperModel
    config: UsersConfig
    dataset: Histories
    encoder: Encoder
    users: Sequence[str]
    embeddings: Float[Tensor, "U D"]
    store: AdapterStore
    folder: Path
    seed: int
    checkpoint_seconds: float
    log: Log
    fixed_router: bool = False
    others: Others = no_others
    bar: Bar = progress

    @property
    def slots(self) -> int:
        """Number of users trained at once."""
        return min(self._slots, max(1, len(self.users)))

    @cached_property
    def _slots(self) -> int:
        if self.config.slots != "auto":
            return self.config.slots
        parts = footprint(self.model, self.config, self.encoder.max_length)
        return auto_slots(parts, device_memory(self.model.device), self.model.device.type)

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

    def jobs(self, indices: Sequence[int], passes: Mapping[str, int] | None) -> HistoryJobs:
        """Return the jobs of the users at `indices`: on all items for `passes`, or with held-out items if None."""
        users = [self.users[at] for at in indices]
        return HistoryJobs(self.config, self.dataset, self.encoder, users, self.embeddings[list(indices)], passes)


def train_users(stage: UserStage) -> dict[str, torch.nn.Parameter]:
    """Run stage 3 and write every user's record to the store; return the LoRA-aware routers' parameters."""
    private_folder(stage.folder)
    if stage.config.tiers.select:
        chosen, passes, metadata = _select(stage)
    else:
        chosen, passes = list(range(len(stage.users))), dict.fromkeys(stage.users, int(stage.config.epochs))
        metadata = _no_metadata
    _fit(stage, stage.jobs(chosen, passes), stage.store, "final", metadata)
    _keep_on_group_tier(stage, chosen, metadata)
    _router(stage, stage.jobs(_fitted(stage, chosen, stage.store), passes), stage.store, "final")
    return stage.model.router_parameters()


Metadata = Callable[[str], Mapping[str, Any]]
"""Function from a user to the metadata of the user's trial."""


def _no_metadata(user: str) -> Mapping[str, Any]:
    return {}


def _select(stage: UserStage) -> tuple[list[int], dict[str, int], Metadata]:
    """Run phases 1 to 3 (trial and tier selection); return the selected users, their passes, and the metadata."""
    trials, quarantined = _trials(stage)
    index = {user: at for at, user in enumerate(stage.users)}
    embeddings = stage.embeddings[[index[trial.user] for trial in trials]]
    pooled = any(trial.passes > 0 and trial.items < stage.config.tiers.pool_below for trial in trials)
    others = stage.others(embeddings) if pooled else ()
    near = torch.cat([embeddings, *(embedding.unsqueeze(0) for _, embedding in others)])
    decisions = decide([*trials, *(trial for trial, _ in others)], near, stage.config.tiers)[: len(trials)]
    decided = {trial.user: (trial, decision) for trial, decision in zip(trials, decisions, strict=True)}
    chosen = [at for at, user in enumerate(stage.users) if user in decided and decided[user][1].up]

    def metadata(user: str) -> Mapping[str, Any]:
        if user in decided:
            trial, decision = decided[user]
            return {**asdict(trial), **asdict(decision)}
        if user in quarantined:
            return quarantined[user]
        job = stage.jobs([index[user]], dict.fromkeys([user], 0))[0]
        return {"reason": refusal(job, None) or "one item cannot be both trained on and held out"}

    return chosen, {trial.user: trial.passes for trial in trials}, metadata


def _trials(stage: UserStage) -> tuple[list[Trial], Mapping[str, Mapping[str, Any]]]:
    """Run phases 1 and 2; return the trials, and the metadata of users in quarantine."""
    path = stage.folder / "trials.json"
    able = [at for at, user in enumerate(stage.users) if len(stage.dataset.history(user, 2)) == 2]
    store = AdapterStore(stage.folder / "trial")
    try:
        if not path.exists():
            _fit(stage, stage.jobs(able, None), store, "trial", _no_metadata)
            jobs = stage.jobs(_fitted(stage, able, store), None)
            _router(stage, jobs, store, "trial")
            write_json(path, [asdict(trial) for trial in _measured(stage, jobs, store)])
        quarantined = {user: metadata for user, tier, metadata, _ in store.facts() if tier == "groups"}
    finally:
        store.close()
    return [Trial(**trial) for trial in read_json(path)], quarantined


def _fit(stage: UserStage, jobs: HistoryJobs, store: AdapterStore, phase: str, metadata: Metadata) -> None:
    """Run stage 3a for these jobs; finished adapters are written to the store."""
    marker = stage.folder / f"{phase}-fit.json"
    if marker.exists() or not len(jobs):
        return
    checkpoint = stage.checkpoint(f"{phase}-fit")
    saved = checkpoint.metadata()
    slots = stage.slots if saved is None else len(saved["seats"])
    trainer = MultiUserTrainer(stage.model, stage.config, stage.rate("users"), stage.seed, slots, stage.pad)

    def record(result: FitResult) -> UserRecord:
        user, state = result.user, result.state
        if result.row is None:
            return refused(stage.embeddings, user, result.embedding, result.reason, metadata(user))
        tensors = trainer.bank.layout.unpack(result.row)
        fault = fault_of(tensors)
        if fault is not None:
            reason = f"quarantined: {fault}"
            _warn(user, reason)
            return refused(stage.embeddings, user, result.embedding, reason, metadata(user))
        adapter = encode(tensors, stage.config.storage)
        metrics = {"items": result.items, "passes": state.best, "held_losses": state.losses, "loss": state.trained}
        return UserRecord(user, Tier.USERS, result.embedding, adapter, {**metrics, **metadata(user)})

    def done(results: Sequence[FitResult], again: bool) -> None:
        records = (record(result) for result in results)
        store.put(new for new in records if not (again and is_stored(store, new)))

    trainer.run(jobs, done, checkpoint, stage.log, f"users: {phase}", stage.bar)
    write_json(marker, {"users": len(jobs)})
    checkpoint.remove()


def _warn(user: str, reason: str) -> None:
    logger.warning(f"proper: user {user!r}: {reason}; the user stays on the group tier")


def is_stored(store: AdapterStore, record: UserRecord) -> bool:
    """Return whether the store already has exactly this record, written before a kill."""
    stored = store.get(record.user)
    return stored is not None and (stored.tier, stored.facts) == (record.tier, record.facts)


def _fitted(stage: UserStage, indices: Sequence[int], store: AdapterStore) -> list[int]:
    """Return the users whose adapter is in the store: all but those in quarantine."""
    heads = ((at, store.head(stage.users[at])) for at in indices)
    return [at for at, head in heads if head is not None and head.tier == "users"]


def _router(stage: UserStage, jobs: HistoryJobs, store: AdapterStore, phase: str) -> None:
    """Run stage 3b for these jobs; W_r is left in the model."""
    parameters = stage.model.router_parameters()
    path = stage.folder / f"{phase}-router.safetensors"
    if stage.fixed_router or not parameters or not len(jobs):
        return
    if path.exists():
        tensors, _ = load_tensors(path)
        for name, parameter in parameters.items():
            parameter.data.copy_(tensors[name])
        return
    config = stage.config
    checkpoint = stage.checkpoint(f"{phase}-router")
    rows, users = jobs.rows() * config.router_epochs, min(ROUTER_USERS, len(stage.users))
    plan = RouterPlan(config, stage.rate("router"), stage.seed, stage.pad, users, rows, checkpoint, stage.log)
    layout = stage.model.user_layout(config)

    def load(user: str, row: Float[Tensor, "P"]) -> None:
        layout.pack(_adapter(store, user)[0], row)

    train_router(stage.model, jobs, load, plan, f"router: {phase}")
    save_tensors(path, parameters, {})
    checkpoint.remove()


def _adapter(store: AdapterStore, user: str) -> tuple[Mapping[str, Tensor], Mapping[str, Any]]:
    """Return the adapter and the metadata of a user who has one."""
    record = store.get(user)
    assert record is not None and record.adapter is not None
    return record.adapter, record.facts


def _measured(stage: UserStage, jobs: HistoryJobs, store: AdapterStore) -> Iterator[Trial]:
    """Yield every user's held-out loss on the group tier and in the served form."""
    layout, model = stage.model.user_layout(stage.config), stage.model
    dtype = torch.promote_types(model.backbone.model.dtype, torch.float32)
    alpha, device = stage.config.alpha, model.device
    bank = AdapterBank(layout, stage.slots, alpha=alpha, trainable=False, device=device, dtype=dtype)
    model.use_bank(bank)
    for at in range(0, len(jobs), stage.slots):
        cohort = {slot: jobs[at + slot] for slot in range(min(stage.slots, len(jobs) - at))}
        passes: dict[int, int] = {}
        for slot, job in cohort.items():
            adapter, metadata = _adapter(store, job.user)
            layout.pack(adapter, bank.values[slot])
            passes[slot] = int(metadata["passes"])
        group = held_out_losses(model, cohort, "groups", stage.pad)
        own = held_out_losses(model, cohort, "users", stage.pad)
        for slot, job in cohort.items():
            if math.isfinite(group[slot]) and math.isfinite(own[slot]):
                yield Trial(job.user, len(job.items) + len(job.held_out), group[slot], own[slot], passes[slot])
            else:
                reason = "quarantined: the held-out loss is not finite"
                _warn(job.user, reason)
                store.put([refused(stage.embeddings, job.user, job.embedding, reason, {})])


def _keep_on_group_tier(stage: UserStage, chosen: Sequence[int], metadata: Metadata) -> None:
    """Write group-tier records, with the reason, for the users who get no adapter."""
    marker = stage.folder / "kept.json"
    if marker.exists():
        return
    others = sorted(set(range(len(stage.users))) - set(chosen))
    for at in range(0, len(others), RECORDS):
        users = ((stage.users[index], stage.embeddings[index]) for index in others[at : at + RECORDS])
        stage.store.put(
            UserRecord(user, Tier.GROUPS, storable(stage.embeddings, embedding), None, metadata(user))
            for user, embedding in users
        )
    write_json(marker, {"users": len(others)})
