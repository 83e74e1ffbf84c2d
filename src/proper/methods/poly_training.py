"""Training of PEFT's Poly in place of stage 2: the same rows in the same batches, users as tasks, no token router.

Skills are trained like experts and a user's logits like user embeddings: at the embeddings' learning rate, and only in
updates with rows of that user.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from proper.adapters.store import AdapterStore, UserRecord
from proper.config import Config
from proper.data.batching import Batch
from proper.data.derived.views import Histories
from proper.errors import DataError
from proper.files import write_json
from proper.layers.batch_context import RowContext
from proper.models.backbone import Backbone, configured_backbone
from proper.models.checkpoints import save_tensors
from proper.models.peft_merge import apply_population
from proper.models.personal import ProperModel, answer_loss, gradient_checkpointing
from proper.models.poly import Poly, add_poly
from proper.run_folder import RunFolder, Stage, Tier
from proper.training.checkpoint import Checkpoint, seed_of
from proper.training.optim import RowAdamW
from proper.training.schedule import resolve_rate
from proper.training.stages import join_processes
from proper.training.trainer import Log, LossSum, TrainingPlan, train


class PolyStage:
    """Training stage with Poly's skills and the users' logits.

    Attributes:
        logits: z_u of every user, all modules concatenated, (U, P), fp32.
        optimizer: optimizer of the logits; its `steps` show which users had rows.
    """

    name = "poly"

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
        total, tokens = answer_loss(self.model.answer_logits(batch, RowContext(slots=slots)), batch.labels)
        return LossSum(total.sum(), tokens.sum())

    def after_backward(self, rate_factor: float, share: float) -> None:
        """Update the logits of the users in this batch."""
        tables = self.poly.tables()
        rows = torch.tensor(sorted(self._present))
        held = [torch.zeros_like(table) if table.grad is None else table.grad for table in tables]
        gradients = torch.cat([grad[rows.to(grad.device)].cpu() for grad in held], dim=1)
        self.optimizer.step(self.logits, rows, gradients, self.rate * rate_factor)
        self.poly.put(rows, self.logits[rows])
        for table in tables:
            table.grad = None
        self._present.clear()

    def state(self) -> dict[str, Tensor]:
        """Return logits and their optimizer moments."""
        return {"logits": self.logits, **{f"logits/{key}": value for key, value in self.optimizer.tensors().items()}}

    def restore(self, tensors: dict[str, Tensor]) -> None:
        """Restore logits and optimizer moments."""
        self.logits.copy_(tensors["logits"])
        prefix = "logits/"
        self.optimizer.restore({k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)})
        self.poly.put(torch.arange(len(self.logits)), self.logits)


class PolyRunner:
    """Trainer of Poly in `folder/groups` on `folder/population`, with users' logits in the store of `folder/users`.

    A user without rows in training gets no record and is answered with the mean of the other users' logits.
    """

    def __init__(self, config: Config, dataset: Histories, folder: Path, seed: int, log: Log) -> None:
        self.config, self.dataset, self.folder, self.seed, self.log = config, dataset, folder, seed, log

    def run(self) -> None:
        """Train to the end, resuming from the checkpoint; do nothing if training is complete.

        Raises:
            ConfigError: the backbone has layers that Poly cannot adapt.
            DataError: there are no rows to train on.
        """
        run = RunFolder(self.folder)
        if run.is_trained(Stage.GROUPS):
            return
        config, started = self.config.groups, time.perf_counter()
        accelerator = join_processes(self.config)
        backbone = configured_backbone(self.config, accelerator.device)
        apply_population(backbone, run.population)
        model, plan = ProperModel(backbone), self._plan(backbone)
        users = [user.id for user in self.dataset.users() if user.history > 0]
        poly = add_poly(model, config, len(users) + 1, seed_of(self.seed, "poly"))
        stage = PolyStage(model, poly, users, config.embedding_learning_rate)
        trained = [*poly.skills().values(), *poly.tables()]
        _switch(poly, trained, on=True)
        with gradient_checkpointing(backbone.model, config.gradient_checkpointing):
            train(stage, plan, accelerator)
        _switch(poly, trained, on=False)
        self._save(stage, users)
        facts = {"rows": plan.sample.size, "tokens": plan.sample.tokens, "users": len(users), "seed": self.seed}
        timed = {**facts, "seconds": round(time.perf_counter() - started, 3), "backbone": backbone.digest}
        write_json(run.marker(Stage.GROUPS), timed)
        plan.checkpoint.remove()

    def _plan(self, backbone: Backbone) -> TrainingPlan:
        """Return the training plan of stage 2: rows, batches and learning rates."""
        config, compute = self.config.groups, self.config.compute
        sample = self.dataset.sample(config.train_on, config.max_tokens, self.seed)
        if not sample.size:
            raise DataError(f"groups.train_on: '{config.train_on}' leaves no rows to train on: there are no such users")
        return TrainingPlan(
            config=config,
            rate=resolve_rate(config.learning_rate, "groups", backbone.hidden_size),
            seed=self.seed,
            encoder=backbone.encoder(compute.max_length),
            pad=backbone.pad_id,
            sample=sample,
            checkpoint=Checkpoint(RunFolder(self.folder).checkpoint(Stage.GROUPS), compute.checkpoint_seconds),
            log=self.log,
        )

    def _save(self, stage: PolyStage, users: Sequence[str]) -> None:
        run, seen = RunFolder(self.folder), stage.optimizer.steps > 0
        tensors = {**stage.parameters(), "mean_logits": stage.logits[seen].mean(0)}
        save_tensors(run.poly, tensors, {"modules": list(stage.poly.layers)})
        store = AdapterStore(run.users.path)
        store.put(UserRecord(user, Tier.GROUPS, stage.logits[at]) for at, user in enumerate(users) if seen[at])
        store.close()


def _switch(poly: Poly, trained: Sequence[nn.Parameter], *, on: bool) -> None:
    """Set skills and logits to training mode with sampled weights, or freeze them."""
    for parameter in trained:
        parameter.requires_grad_(on)
    poly.sample(on)
