"""Stage 2 training: LoRA experts shared by all users, mixed per token by a user-aware router (method: stage 2).

Trained parameters: experts, routers, and one embedding per user. Embeddings of users who are not in a batch do not
change: embeddings have a learning rate, moments and step counts of their own.

`recipes/stage2_groups.py` is the same as one flat loop.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from jaxtyping import Float
from torch import Tensor, nn

from proper.config import GroupsConfig
from proper.data.batching import Batch, number_users
from proper.layers.batch_context import RowContext
from proper.layers.routing_losses import constraint_loss
from proper.models.gradient_checkpointing import gradient_checkpointing
from proper.models.personal import ProperModel
from proper.training.checkpoint import seed_of
from proper.training.optim import RowAdamW
from proper.training.privacy import train_privately
from proper.training.trainer import LossSum, TrainableStage, TrainingPlan, train


class GroupsStage:
    """The `TrainableStage` of experts, routers and user embeddings for the training loop.

    The constraint couples all users of a batch, so a batch cannot be computed in parts. One of more than `batch_tokens`
    tokens recomputes its activations in the backward pass instead, to save memory.

    Attributes:
        embeddings: e_u of every user (U, D), fp32, initialized from N(0, `groups.embedding_init`^2).
    """

    name = "groups"

    def __init__(
        self,
        model: ProperModel,
        config: GroupsConfig,
        users: Sequence[str],
        seed: int,
        accelerator: Accelerator,
        batch_tokens: float = math.inf,
    ) -> None:
        self.model, self.config, self.accelerator, self.batch_tokens = model, config, accelerator, batch_tokens
        self.index = {user: at for at, user in enumerate(users)}
        self.embeddings = first_embeddings(config, len(users), model.embedding_size, seed)
        self.optimizer = RowAdamW.of(self.embeddings)
        self._pending: list[tuple[list[int], Tensor]] = []

    @property
    def in_parts(self) -> bool:
        """Whether a batch may be computed in parts: only without the constraint."""
        return self.config.constraint.kind == "none"

    def parameters(self) -> dict[str, nn.Parameter]:
        """Return the parameters of experts and routers."""
        return self.model.group_parameters()

    def loss(self, batch: Batch, progress: float) -> LossSum:
        """Return the answer loss of a batch of several users, and the weighted constraint on the gates."""
        with self.saving_memory(batch):
            total, tokens = self.model.answer_losses(batch, self.rows(batch))
        return LossSum(total.sum(), tokens.sum(), self.penalty(progress))

    def saving_memory(self, batch: Batch) -> AbstractContextManager[None]:
        """Return the context of a batch's forward pass, in which a large batch does not keep its activations."""
        large = batch.input_ids.numel() > self.batch_tokens and not self.config.gradient_checkpointing
        # Nothing to switch on for the others: it takes a walk over all modules. The stage may have switched it on.
        return gradient_checkpointing(self.model.backbone.model, True) if large else nullcontext()

    def rows(self, batch: Batch) -> RowContext:
        """Return the layers' row context, with embeddings whose gradients the next update uses."""
        users, numbers = number_users(batch.users)
        index = [self.index[user] for user in users]
        own = self.embeddings[index].to(batch.input_ids.device).requires_grad_()
        self._pending.append((index, own))
        who = torch.tensor(numbers, device=own.device)
        return RowContext("groups", embedding=own[who], users=who, mask=batch.attention_mask.bool())

    def penalty(self, progress: float) -> Tensor | None:
        """Return the weighted constraint on the gates of the batch in the last forward pass."""
        constraint = self.config.constraint
        if constraint.kind == "none":
            return None
        warm = 1.0 if progress >= constraint.warmup else progress / constraint.warmup
        return warm * constraint.weight * constraint_loss(constraint.kind, self.model.routing.stacked())

    def after_backward(self, rate_factor: float) -> None:
        """Update the embeddings of this step's users, with gradients summed over all processes."""
        gradients: dict[int, Tensor] = {}
        for index, own in self._pending:
            if own.grad is not None:
                for row, gradient in zip(index, own.grad.cpu(), strict=True):
                    gradients[row] = gradients[row] + gradient if row in gradients else gradient
        self._pending.clear()
        if self.accelerator.num_processes > 1:
            gradients = _sum_rows(gradients)
        if gradients:
            rows = torch.tensor(sorted(gradients))
            stacked = torch.stack([gradients[int(row)] for row in rows])
            self.optimizer.step(self.embeddings, rows, stacked, self.config.embedding_learning_rate * rate_factor)

    def state(self) -> dict[str, Tensor]:
        """Return embeddings and their moments."""
        return {"embeddings": self.embeddings, **self.optimizer.tensors("embeddings/")}

    def restore(self, tensors: dict[str, Tensor]) -> None:
        """Restore embeddings and moments."""
        self.embeddings.copy_(tensors["embeddings"])
        self.optimizer.restore(tensors, "embeddings/")


def first_embeddings(config: GroupsConfig, users: int, size: int, seed: int) -> Float[Tensor, "U D"]:
    """Return the users' embeddings before training, in the order of the stage's users."""
    generator = torch.Generator().manual_seed(seed_of(seed, "embeddings") % 2**63)
    return config.embedding_init * torch.randn(users, size, generator=generator)


def train_groups(
    model: ProperModel,
    config: GroupsConfig,
    users: Sequence[str],
    plan: TrainingPlan,
    accelerator: Accelerator,
    start: Float[Tensor, "U D"] | None = None,
) -> Tensor:
    """Train stage 2 in place and return the users' embeddings (U, D) in the order of `users`.

    Embeddings go on from `start`, or begin at random as in a new run.
    """
    stage = GroupsStage(model, config, users, plan.seed, accelerator, plan.batch_tokens)
    if start is not None:
        stage.embeddings.copy_(start)
    train_stage(stage, model, config, plan, accelerator)
    return stage.embeddings


def train_stage(
    stage: TrainableStage, model: ProperModel, config: GroupsConfig, plan: TrainingPlan, accelerator: Accelerator
) -> None:
    """Train the experts and routers of a stage in place; they are frozen before and after."""
    for parameter in stage.parameters().values():
        parameter.requires_grad_(True)
    model.train(True)
    with gradient_checkpointing(model.backbone.model, config.gradient_checkpointing):
        if plan.privacy is not None:
            train_privately(stage, plan, accelerator)
        else:
            train(stage, plan, accelerator)
    model.train(False)
    for parameter in stage.parameters().values():
        parameter.requires_grad_(False)


def _sum_rows(gradients: dict[int, Tensor]) -> dict[int, Tensor]:
    """Sum every user's gradient over all processes."""
    summed: dict[int, Tensor] = {}
    for row, gradient in gather_object(list(gradients.items())):
        summed[row] = summed[row] + gradient if row in summed else gradient
    return summed
