"""Poly as a baseline in place of stage 2: the same rows in the same batches, users as tasks, no token router.

Skills are trained like experts and a user's logits like user embeddings: at the embeddings' learning rate, and only in
updates with rows of that user. A user without logits (unknown, or without rows in training) gets the mean of the other
users' logits, as an unknown user of the group model gets the mean embedding.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from proper.adapters.store import AdapterStore, UserRecord
from proper.config import Config
from proper.data.batching import Batch
from proper.data.encoder import Encoder
from proper.data.stage_sample import stage_sample
from proper.evaluation.runner import MethodRun, predict
from proper.files import write_json
from proper.layers.batch_context import RowContext
from proper.methods.poly_layers import Poly, add_poly
from proper.methods.spec import TrainedRun, TrainingWork
from proper.models.backbone import configured_backbone
from proper.models.checkpoints import fill, load_tensors, save_tensors, tensor_of
from proper.models.gradient_checkpointing import gradient_checkpointing
from proper.models.peft_merge import apply_population
from proper.models.personal import ProperModel
from proper.run_folder import RunFolder, Stage, Tier
from proper.training.checkpoint import seed_of
from proper.training.optim import RowAdamW
from proper.training.plans import stage_plan
from proper.training.stages import join_processes
from proper.training.trainer import LossSum, train


class PolyStage:
    """Training stage with Poly's skills and the users' logits.

    Attributes:
        logits: z_u of every user, all modules concatenated, (U, P), fp32.
        optimizer: optimizer of the logits; its `steps` show which users had rows.
    """

    name = "poly"
    in_parts = True

    def __init__(self, model: ProperModel, poly: Poly, users: Sequence[str], rate: float) -> None:
        self.model, self.poly, self.rate = model, poly, rate
        self.index = {user: at for at, user in enumerate(users)}
        self.logits = poly.logits()[: len(users)]
        self.optimizer = RowAdamW.of(self.logits)
        self._present: set[int] = set()

    def parameters(self) -> dict[str, nn.Parameter]:
        """Return the skills."""
        return self.poly.skills()

    def loss(self, batch: Batch, progress: float) -> LossSum:
        """Return the answer loss of a batch, each row with its user's mixture of skills."""
        own = [self.index[user] for user in batch.users]
        self._present |= set(own)
        slots = torch.tensor(own, device=batch.input_ids.device)
        total, tokens = self.model.answer_losses(batch, RowContext(slots=slots))
        return LossSum(total.sum(), tokens.sum())

    def after_backward(self, rate_factor: float) -> None:
        """Update the logits of the users in this batch."""
        tables = self.poly.tables()
        rows = torch.tensor(sorted(self._present))
        full = [torch.zeros_like(table) if table.grad is None else table.grad for table in tables]
        gradients = torch.cat([gradient[rows.to(gradient.device)].cpu() for gradient in full], dim=1)
        self.optimizer.step(self.logits, rows, gradients, self.rate * rate_factor)
        self.poly.put(rows, self.logits[rows])
        for table in tables:
            table.grad = None
        self._present.clear()

    def state(self) -> dict[str, Tensor]:
        """Return logits and their optimizer moments."""
        return {"logits": self.logits, **self.optimizer.tensors("logits/")}

    def restore(self, tensors: dict[str, Tensor]) -> None:
        """Restore logits and optimizer moments."""
        self.logits.copy_(tensors["logits"])
        self.optimizer.restore(tensors, "logits/")
        self.poly.put(torch.arange(len(self.logits)), self.logits)


def train_poly(work: TrainingWork) -> None:
    """Train Poly in `groups` of the run folder, on its `population`, with users' logits in the store of `users`.

    Training resumes from the checkpoint and does nothing if it is complete. A user without rows in training gets no
    record.

    Raises:
        ConfigError: the backbone has layers that Poly cannot adapt.
        DataError: there are no rows to train on.
    """
    run = work.run
    marker = RunFolder(run.folder).marker(Stage.GROUPS)
    if marker.exists():
        return
    config, started = run.config.groups, time.perf_counter()
    accelerator = join_processes(run.config)
    backbone = configured_backbone(run.config, accelerator.device)
    apply_population(backbone, RunFolder(run.folder).population)
    sample = stage_sample(run.dataset, "groups", run.config, run.seed)
    encoder = backbone.encoder()
    plan = stage_plan("groups", run.config, sample, backbone, encoder, run.folder, run.seed, work.log)
    model = ProperModel(backbone)
    users = [user.id for user in run.dataset.users() if user.history > 0]
    poly = add_poly(model, config, len(users) + 1, seed_of(run.seed, "poly"))
    stage = PolyStage(model, poly, users, config.embedding_learning_rate)
    trained = [*poly.skills().values(), *poly.tables()]
    _set_training(poly, trained, on=True)
    with gradient_checkpointing(backbone.model, config.gradient_checkpointing):
        train(stage, plan, accelerator)
    _set_training(poly, trained, on=False)
    _save(run, stage, users)
    metadata = {"rows": sample.size, "tokens": sample.tokens, "users": len(users), "seed": run.seed}
    seconds = round(time.perf_counter() - started, 3)
    write_json(marker, {**metadata, "seconds": seconds, "backbone": backbone.digest})
    plan.checkpoint.remove()


def _save(run: TrainedRun, stage: PolyStage, users: Sequence[str]) -> None:
    seen = stage.optimizer.steps > 0
    tensors = {**stage.parameters(), "mean_logits": stage.logits[seen].mean(0)}
    save_tensors(RunFolder(run.folder).poly, tensors, {"modules": list(stage.poly.layers)})
    store = AdapterStore(RunFolder(run.folder).users.path)
    store.put(UserRecord(user, Tier.GROUPS, stage.logits[at]) for at, user in enumerate(users) if seen[at])
    store.close()


def _set_training(poly: Poly, trained: Sequence[nn.Parameter], *, on: bool) -> None:
    """Set skills and logits to training mode with sampled weights, or freeze them."""
    for parameter in trained:
        parameter.requires_grad_(on)
    poly.sample(on)


@dataclass(frozen=True)
class PolyModel:
    """A `BatchModel` that selects each row's mixture by Poly's task id.

    Attributes:
        tasks: task id of every user with logits; all other users have the task `mean_task`.
    """

    model: ProperModel
    encoder: Encoder
    config: Config
    tasks: Mapping[str, int]

    @property
    def mean_task(self) -> int:
        """The task id with the mean logits."""
        return len(self.tasks)

    def tier(self, user: str | None) -> Tier:
        """Return GROUPS for a user with own logits, else NONE."""
        return Tier.GROUPS if user in self.tasks else Tier.NONE

    def rows(self, users: Sequence[str | None], task: int = 0) -> RowContext:
        """Return each row's task id, that is, its user's; the task of a run of several is not told apart."""
        del task
        own = [self.mean_task if user is None else self.tasks.get(user, self.mean_task) for user in users]
        return RowContext(slots=torch.tensor(own, device=self.model.device))


def load_poly(run: TrainedRun) -> PolyModel:
    """Load the backbone, its population, and Poly with the logits of the target users."""
    config = run.config
    backbone = configured_backbone(config)
    apply_population(backbone, RunFolder(run.folder).population)
    model, store = ProperModel(backbone), AdapterStore(RunFolder(run.folder).users.path)
    heads = {user.id: head for user in run.dataset.users("target") if (head := store.head(user.id)) is not None}
    store.close()
    path = RunFolder(run.folder).poly
    tensors, _ = load_tensors(path)
    poly = add_poly(model, config.groups, len(heads) + 1, seed=0)
    fill(poly.skills(), tensors, path)
    logits = [*(head.embedding for head in heads.values()), tensor_of(tensors, "mean_logits", path)]
    poly.put(torch.arange(len(logits)), torch.stack(logits))
    encoder = backbone.encoder()
    return PolyModel(model, encoder, config, {user: at for at, user in enumerate(heads)})


def answer_poly(run: TrainedRun) -> MethodRun:
    """Answer every query with Poly."""
    return predict(load_poly(run), run.dataset, run.config.task, f"poly, {run.folder.name}")
