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
from proper.adapters.store import AdapterStore, UserRecord
from proper.adapters.validation import fault_of
from proper.config import UsersConfig
from proper.console import Bar, progress
from proper.data.derived.views import Histories
from proper.data.encoder import EncodedExample, Encoder
from proper.files import private_folder, read_json, write_json
from proper.models.checkpoints import load_tensors, save_tensors
from proper.models.personal import ProperModel
from proper.training.checkpoint import Checkpoint
from proper.training.group_tier_record import refused, storable
from proper.training.jobs import FitProgress, FitResult, Job, refusal
from proper.training.lora_router import RouterPlan, train_router
from proper.training.memory import auto_slots, device_memory, footprint
from proper.training.multi_user_trainer import MultiUserTrainer
from proper.training.schedule import resolve_rate
from proper.training.tier_selection import Others, Trial, decide, nobody
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
    others: Others = nobody
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

    def history(self, user: str) -> list[EncodedExample]:
        """Return a user's newest items (at most `max_items`) as tokens, oldest first."""
        return [self.encoder.encode(example) for example in self.dataset.history(user, self.config.max_items)]


class _Jobs:
    """The jobs of some users, created on access."""

    def __init__(self, stage: UserStage, indices: Sequence[int], passes: Mapping[str, int] | None) -> None:
        self.stage, self.indices, self.passes = stage, indices, passes

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, at: int, /) -> Job:
        stage, index = self.stage, self.indices[at]
        user, config = stage.users[index], stage.config
        items = stage.history(user)
        embedding, epochs = stage.embeddings[index], int(config.epochs)
        if self.passes is not None:
            return Job(user, embedding, tuple(items), epochs=self.passes[user], horizon=epochs)
        cut = len(items) - held_out(len(items), config.tiers.validation)
        return Job(user, embedding, tuple(items[:cut]), tuple(items[cut:]), epochs=epochs)

    def rows(self) -> int:
        """Return the number of training items of all jobs, without encoding any."""
        stage, found = self.stage, 0
        for index in self.indices:
            items = len(stage.dataset.history(stage.users[index], stage.config.max_items))
            found += items if self.passes is not None else items - held_out(items, stage.config.tiers.validation)
        return found


def held_out(items: int, share: float) -> int:
    """Return how many of a user's newest items are held out: at least one, and never all."""
    return min(items - 1, max(1, round(items * share)))


def train_users(stage: UserStage) -> dict[str, torch.nn.Parameter]:
    """Run stage 3 and write every user's record to the store; return the LoRA-aware routers' parameters."""
    private_folder(stage.folder)
    chosen, passes, facts = _select(stage) if stage.config.tiers.select else _everybody(stage)
    _fit(stage, _Jobs(stage, chosen, passes), stage.store, "final", facts)
    _keep_on_group_tier(stage, chosen, facts)
    _router(stage, _Jobs(stage, _fitted(stage, chosen, stage.store), passes), stage.store, "final")
    return stage.model.router_parameters()


Facts = Callable[[str], Mapping[str, Any]]
"""Function from a user to the metadata of the user's trial."""


def _everybody(stage: UserStage) -> tuple[list[int], dict[str, int], Facts]:
    return list(range(len(stage.users))), dict.fromkeys(stage.users, int(stage.config.epochs)), lambda user: {}


def _select(stage: UserStage) -> tuple[list[int], dict[str, int], Facts]:
    """Run phases 1 to 3 (trial and tier selection); return the selected users, their passes, and the metadata."""
    path = stage.folder / "trials.json"
    able = [at for at, user in enumerate(stage.users) if len(stage.dataset.history(user, 2)) == 2]
    trial_store = AdapterStore(stage.folder / "trial")
    try:
        if not path.exists():
            _fit(stage, _Jobs(stage, able, None), trial_store, "trial", lambda user: {})
            jobs = _Jobs(stage, _fitted(stage, able, trial_store), None)
            _router(stage, jobs, trial_store, "trial")
            write_json(path, [asdict(trial) for trial in _served(stage, jobs, trial_store)])
        refused = {user: told for user, tier, told, _ in trial_store.facts() if tier == "groups"}
    finally:
        trial_store.close()
    trials = [Trial(**trial) for trial in read_json(path)]
    index = {user: at for at, user in enumerate(stage.users)}
    embeddings = stage.embeddings[[index[trial.user] for trial in trials]]
    pooled = any(trial.passes > 0 and trial.items < stage.config.tiers.pool_below for trial in trials)
    others = stage.others(embeddings) if pooled else ()
    everybody = torch.cat([embeddings, *(theirs.unsqueeze(0) for _, theirs in others)])
    decisions = decide([*trials, *(trial for trial, _ in others)], everybody, stage.config.tiers)[: len(trials)]
    decided = {trial.user: (trial, decision) for trial, decision in zip(trials, decisions, strict=True)}
    chosen = [at for at, user in enumerate(stage.users) if user in decided and decided[user][1].up]

    def facts(user: str) -> Mapping[str, Any]:
        if user in decided:
            trial, decision = decided[user]
            return {**asdict(trial), **asdict(decision)}
        return refused.get(user) or {"reason": _why_untried(stage, user)}

    return chosen, {trial.user: trial.passes for trial in trials}, facts


def _why_untried(stage: UserStage, user: str) -> str:
    items = tuple(stage.history(user))
    return refusal(Job(user, torch.empty(0), items), None) or "one item cannot be both trained on and held out"


def _fit(stage: UserStage, jobs: _Jobs, store: AdapterStore, phase: str, facts: Facts) -> None:
    """Run stage 3a for these jobs; finished adapters are written to the store."""
    marker = stage.folder / f"{phase}-fit.json"
    if marker.exists() or not len(jobs):
        return
    checkpoint = stage.checkpoint(f"{phase}-fit")
    held = checkpoint.facts()
    slots = stage.slots if held is None else len(held["seats"])
    engine = MultiUserTrainer(stage.model, stage.config, stage.rate("users"), stage.seed, slots, stage.pad)

    def record(outcome: FitResult) -> UserRecord:
        user, state = outcome.user, outcome.state
        if outcome.row is None:
            return refused(stage.embeddings, user, outcome.embedding, outcome.reason, facts(user))
        tensors = engine.bank.layout.unpack(outcome.row)
        fault = fault_of(tensors)
        if fault is not None:
            logger.warning(f"proper: user {user!r}: quarantined: {fault}; they stay on the group tier")
            return refused(stage.embeddings, user, outcome.embedding, f"quarantined: {fault}", facts(user))
        adapter = encode(tensors, stage.config.storage)
        told = {"items": outcome.items, "passes": state.best, "held_losses": state.losses, "loss": state.trained}
        return UserRecord(user, "users", outcome.embedding, adapter, {**told, **facts(user)})

    def done(outcomes: Sequence[FitResult], again: bool) -> None:
        records = (record(outcome) for outcome in outcomes)
        store.put(new for new in records if not (again and is_held(store, new)))

    engine.run(jobs, done, checkpoint, stage.log, f"users: {phase}", stage.bar)
    write_json(marker, {"users": len(jobs)})
    checkpoint.remove()


def is_held(store: AdapterStore, record: UserRecord) -> bool:
    """Return whether the store already has exactly this record, written before a kill."""
    held = store.get(record.user)
    return held is not None and (held.tier, held.facts) == (record.tier, record.facts)


def _fitted(stage: UserStage, indices: Sequence[int], store: AdapterStore) -> list[int]:
    """Return the users whose adapter is in the store: all but those in quarantine."""
    heads = ((at, store.head(stage.users[at])) for at in indices)
    return [at for at, head in heads if head is not None and head.tier == "users"]


def _router(stage: UserStage, jobs: _Jobs, store: AdapterStore, phase: str) -> None:
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
    train_router(stage.model, jobs, _loader(stage, store), plan, f"router: {phase}")
    save_tensors(path, parameters, {})
    checkpoint.remove()


def _served(stage: UserStage, jobs: _Jobs, store: AdapterStore) -> Iterator[Trial]:
    """Yield every user's held-out loss on the group tier and in the served form."""
    engine = MultiUserTrainer(stage.model, stage.config, 0.0, stage.seed, stage.slots, stage.pad)
    layout = engine.bank.layout
    for at in range(0, len(jobs), stage.slots):
        slots = list(range(min(stage.slots, len(jobs) - at)))
        told: dict[int, Mapping[str, Any]] = {}
        for slot in slots:
            job = jobs[at + slot]
            engine.seats[slot] = (job, FitProgress(at + slot))
            record = store.get(job.user)
            assert record is not None and record.adapter is not None
            layout.pack(record.adapter, engine.bank.values[slot])
            told[slot] = record.facts
        group = engine.held_losses(slots, "groups")
        own = engine.held_losses(slots, "users")
        for slot in slots:
            job, _ = engine.sitting(slot)
            if math.isfinite(group[slot]) and math.isfinite(own[slot]):
                items, passes = len(job.items) + len(job.held), int(told[slot]["passes"])
                yield Trial(job.user, items, group[slot], own[slot], passes)
            else:
                reason = "quarantined: the held-out loss is not finite"
                logger.warning(f"proper: user {job.user!r}: {reason}; they stay on the group tier")
                store.put([refused(stage.embeddings, job.user, job.embedding, reason, {})])


def _keep_on_group_tier(stage: UserStage, chosen: Sequence[int], facts: Facts) -> None:
    """Write group-tier records, with the reason, for the users who get no adapter."""
    marker = stage.folder / "kept.json"
    if marker.exists():
        return
    others = sorted(set(range(len(stage.users))) - set(chosen))
    for at in range(0, len(others), RECORDS):
        users = ((stage.users[index], stage.embeddings[index]) for index in others[at : at + RECORDS])
        stage.store.put(
            UserRecord(user, "groups", storable(stage.embeddings, embedding), None, facts(user))
            for user, embedding in users
        )
    write_json(marker, {"users": len(others)})


def _loader(stage: UserStage, store: AdapterStore) -> Callable[[str, Float[Tensor, "P"]], None]:
    layout = stage.model.layout(stage.config.rank)

    def load(user: str, row: Float[Tensor, "P"]) -> None:
        record = store.get(user)
        assert record is not None and record.adapter is not None
        layout.pack(record.adapter, row)

    return load
