"""Stage 3: an adapter for every user who gains from one, then the router that knows it (method: stage 3, tiers).

    1. trial:  every user's adapter on the older part of their history, stopped where their held-out items say so
    2. 3b on those adapters, because users are served in that form
    3. tiers:  who is better off with the adapter than on the group tier
    4. final:  the adapters of those who are, on all their items, for as many passes as were best
    5. 3b on the final adapters

Each phase leaves a file, so a restart goes on after the last one. Knows how users are trained, not how they are stored:
adapters pass through `AdapterStore`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from proper.adapters.store import AdapterStore, UserRecord
from proper.config import UsersConfig
from proper.data.batching import Encoded, Encoder
from proper.data.views import Histories
from proper.files import read_json, write_json
from proper.models.personal import ProperModel
from proper.models.tensors import load_tensors, save_tensors
from proper.training.checkpoint import Checkpoint
from proper.training.engine import Engine, Job, Progress
from proper.training.loop import Log
from proper.training.router import RouterPlan, train_router
from proper.training.schedule import resolve_rate
from proper.training.tiers import Decision, Trial, decide

DEFAULT_SLOTS = 32


@dataclass(frozen=True)
class UserStage:
    """Everything stage 3 works with.

    Attributes:
        users: whom to fit, in order.
        embeddings: e_u of these users (U, D); not trained here.
        folder: where phases leave their files while the stage runs; the caller removes it when all is saved.
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

    @property
    def slots(self) -> int:
        """How many users are resident at once."""
        return min(DEFAULT_SLOTS if self.config.slots == "auto" else self.config.slots, max(1, len(self.users)))

    @property
    def pad(self) -> int:
        """The padding token."""
        return self.model.backbone.pad_id

    def rate(self, stage: str) -> float:
        """The learning rate of "users" (3a) or "router" (3b)."""
        wanted = self.config.learning_rate if stage == "users" else self.config.router_learning_rate
        return resolve_rate(wanted, stage, self.model.backbone.hidden_size)

    def checkpoint(self, name: str) -> Checkpoint:
        """The checkpoint of a phase."""
        return Checkpoint(self.folder / f"{name}.checkpoint", self.checkpoint_seconds)

    def history(self, user: str) -> list[Encoded]:
        """A user's newest items in tokens, oldest first."""
        return [self.encoder.encode(example) for example in self.dataset.history(user, self.config.max_items)]


class _Jobs:
    """The jobs of some users, made when asked for."""

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
        return sum(len(self[at].items) for at in range(len(self)))


def held_out(items: int, share: float) -> int:
    """How many of a user's newest items are held out: at least one, and never all."""
    return min(items - 1, max(1, round(items * share)))


def train_users(stage: UserStage) -> dict[str, torch.nn.Parameter]:
    """Run stage 3, leaving every user's record in the store; return the LoRA-aware routers' tensors."""
    stage.folder.mkdir(parents=True, exist_ok=True)
    everybody = list(range(len(stage.users)))
    passes = dict.fromkeys(stage.users, int(stage.config.epochs))
    if stage.config.tiers.select:
        decisions, trials = _select(stage, everybody)
        passes = {trial.user: trial.passes for trial in trials}
        facts = {user: {"reason": "one item cannot be both trained on and held out"} for user in stage.users}
        facts |= {d.user: {**asdict(t), **asdict(d)} for d, t in zip(decisions, trials, strict=True)}
        up = {d.user for d in decisions if d.up}
        chosen = [index for index in everybody if stage.users[index] in up]
    else:
        facts, chosen = {}, everybody
    _fit(stage, _Jobs(stage, chosen, passes), stage.store, "final", facts)
    _keep_on_group_tier(stage, set(everybody) - set(chosen), facts)
    _router(stage, _Jobs(stage, chosen, passes), stage.store, "final")
    return stage.model.router_parameters()


def _select(stage: UserStage, everybody: Sequence[int]) -> tuple[list[Decision], list[Trial]]:
    """Phases 1 to 3: fit on the older items, then see who is better off."""
    path = stage.folder / "trials.json"
    able = [index for index in everybody if len(stage.dataset.history(stage.users[index], 2)) == 2]
    jobs = _Jobs(stage, able, None)
    if not path.exists():
        trial_store = AdapterStore(stage.folder / "trial")
        try:
            _fit(stage, jobs, trial_store, "trial", {})
            _router(stage, jobs, trial_store, "trial")
            write_json(path, [asdict(trial) for trial in _served(stage, jobs, trial_store)])
        finally:
            trial_store.close()
    trials = [Trial(**trial) for trial in read_json(path)]
    return decide(trials, stage.embeddings[able], stage.config.tiers), trials


def _fit(
    stage: UserStage, jobs: _Jobs, store: AdapterStore, phase: str, facts: Mapping[str, Mapping[str, Any]]
) -> None:
    """Stage 3a for these jobs; every adapter goes to the store as soon as it is done."""
    marker = stage.folder / f"{phase}-fit.json"
    if marker.exists() or not len(jobs):
        return
    engine = Engine(stage.model, stage.config, stage.rate("users"), stage.seed, stage.slots, stage.pad)
    keep = _storage(stage.config)

    def done(job: Job, state: Progress, row: Float[Tensor, "P"]) -> None:
        adapter = {name: tensor.to(keep) for name, tensor in engine.bank.layout.unpack(row).items()}
        told = {"items": len(job.items), "passes": state.best, "held_losses": state.losses, "loss": state.trained}
        record = UserRecord(job.user, "users", job.embedding, adapter, {**told, **facts.get(job.user, {})})
        store.put([record])

    checkpoint = stage.checkpoint(f"{phase}-fit")
    engine.run(jobs, done, checkpoint, stage.log, f"users: {phase}")
    write_json(marker, {"users": len(jobs)})
    checkpoint.remove()


def _router(stage: UserStage, jobs: _Jobs, store: AdapterStore, phase: str) -> None:
    """Stage 3b for these jobs; leaves W_r in the model."""
    parameters = stage.model.router_parameters()
    path = stage.folder / f"{phase}-router.safetensors"
    if not parameters or not len(jobs):
        return
    if path.exists():
        tensors, _ = load_tensors(path)
        for name, parameter in parameters.items():
            parameter.data.copy_(tensors[name])
        return
    config = stage.config
    checkpoint = stage.checkpoint(f"{phase}-router")
    rows = jobs.rows() * config.router_epochs
    plan = RouterPlan(config, stage.rate("router"), stage.seed, stage.pad, stage.slots, rows, checkpoint, stage.log)
    train_router(stage.model, jobs, _loader(stage, store), plan, f"router: {phase}")
    save_tensors(path, parameters, {})
    checkpoint.remove()


def _served(stage: UserStage, jobs: _Jobs, store: AdapterStore) -> list[Trial]:
    """Held-out loss of every user on the group tier and in the form that is served."""
    engine = Engine(stage.model, stage.config, 0.0, stage.seed, stage.slots, stage.pad)
    load, trials = _loader(stage, store), []
    for at in range(0, len(jobs), stage.slots):
        slots = range(min(stage.slots, len(jobs) - at))
        for slot in slots:
            job = jobs[at + slot]
            engine.seats[slot] = (job, Progress(at + slot))
            load(job.user, engine.bank.values[slot])
        group = engine.held_losses(list(slots), "groups")
        own = engine.held_losses(list(slots), "users")
        for slot in slots:
            job = jobs[at + slot]
            record = store.get(job.user)
            passes = int(record.facts["passes"]) if record else 0
            items = len(job.items) + len(job.held)
            trials.append(Trial(job.user, items, group[slot], own[slot], passes))
    return trials


def _keep_on_group_tier(stage: UserStage, indices: set[int], facts: Mapping[str, Mapping[str, Any]]) -> None:
    records = []
    for index in sorted(indices):
        user = stage.users[index]
        records.append(UserRecord(user, "groups", stage.embeddings[index], None, facts.get(user, {})))
    stage.store.put(records)


def _loader(stage: UserStage, store: AdapterStore) -> Callable[[str, Float[Tensor, "P"]], None]:
    layout = stage.model.layout(stage.config.rank)

    def load(user: str, row: Float[Tensor, "P"]) -> None:
        record = store.get(user)
        assert record is not None and record.adapter is not None
        layout.pack(record.adapter, row)

    return load


def _storage(config: UsersConfig) -> torch.dtype:
    return torch.bfloat16 if config.storage == "bf16" else torch.float32
