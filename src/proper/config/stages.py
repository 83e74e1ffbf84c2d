"""Settings of the three training stages as pydantic models."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BeforeValidator, Field, model_validator

from proper.config.section import Count, Fraction, Positive, Section
from proper.config.updates import DriftConfig, UpdateConfig

Rate = Positive | Literal["auto"]


class OptimizerConfig(Section):
    """Optimizer settings of every stage.

    Attributes:
        epochs: passes over the stage's rows.
        batch_size: rows of a step.
        learning_rate: peak rate of AdamW; `auto` scales the paper's rate by 4096 / hidden size.
        weight_decay: decoupled weight decay.
        warmup: share of the steps in which the rate rises.
        schedule: how the rate falls after the warm-up.
        clip: largest norm of a step's gradient.
        gradient_accumulation: batches that make one step.
        gradient_checkpointing: recompute activations in the backward pass, to save memory.
    """

    epochs: Annotated[float, Field(gt=0)] = 2
    batch_size: Count = 8
    learning_rate: Rate = "auto"
    weight_decay: Annotated[float, Field(ge=0)] = 0.0
    warmup: Fraction = 0.03
    schedule: Literal["cosine", "linear", "constant"] = "cosine"
    clip: Positive = 1.0
    gradient_accumulation: Count = 1
    gradient_checkpointing: bool = False


TargetModules = Literal["auto", "ffn", "attention", "all"] | list[str]


def _last(value: object) -> object:
    """Return the number N of the spelling `last N`, and any other value as it is."""
    words = value.split() if isinstance(value, str) else []
    return int(words[1]) if len(words) == 2 and words[0] == "last" and words[1].isdecimal() else value


LastLayers = Annotated[Literal["all"] | Count, BeforeValidator(_last)]
"""All decoder layers, or the last N of them."""


class PopulationConfig(OptimizerConfig):
    """Stage 1: one LoRA trained on all users' histories and merged into the backbone.

    Attributes:
        rank: rank of the LoRA.
        alpha: the output of the LoRA is multiplied by alpha / rank.
        dropout: dropout rate on the LoRA's input.
        target_modules: layers that get the LoRA: a group of them, or a list of names.
        train_on: the histories of all users, or of users who are not targets.
        max_tokens: budget of training tokens; null means all.
        sampling: how rows are drawn within the budget: `users` takes one row of every user in turn, `rows` takes rows
            at random, so that a user counts in proportion to their history. On MovieLens the loss was lower with `rows`
            for users with long histories, and higher for those with short ones.
        patience: measurements of the held-out loss, of ten over all epochs, without a lower one after which training
            ends, but not within the first epoch; the weights with the lowest loss are kept. 0 trains all epochs on all
            rows.
        validation: share of the rows that is held out to measure this loss: at most 128 rows, sampled evenly over users
            whatever `sampling` is, so that they are not those of a few users; if it would be fewer than 16 rows, none
            are held out.
    """

    rank: Count = 8
    alpha: Positive = 16
    dropout: Fraction = 0.05
    target_modules: TargetModules = "all"
    epochs: Annotated[float, Field(gt=0)] = 3
    weight_decay: Annotated[float, Field(ge=0)] = 0.1
    train_on: Literal["all", "others"] = "all"
    max_tokens: Count | None = None
    sampling: Literal["users", "rows"] = "users"
    patience: Annotated[int, Field(ge=0)] = 3
    validation: Annotated[float, Field(gt=0, le=0.5)] = 0.05

    @property
    def held_out_share(self) -> float:
        """Share of the rows that is held out for early stopping; 0 without it."""
        return self.validation if self.patience else 0.0


MAX_EXPERTS = 16
"""Number of experts with which `groups.experts: auto` trains first, and the most that it finds."""


class ConstraintConfig(Section):
    """Regularization term that keeps the expert mixtures of different users apart.

    Attributes:
        kind: form of the penalty: on equal mixtures of different users, on even mixtures, that of the released code,
            or none.
        weight: weight of the penalty in the loss.
        warmup: share of the steps in which the weight rises.
    """

    kind: Literal["users", "experts", "released", "none"] = "users"
    weight: Annotated[float, Field(ge=0)] = 0.01
    warmup: Fraction = 0.1


class GroupsConfig(OptimizerConfig):
    """Stage 2: LoRA experts shared by all users, mixed by a user-aware router.

    Attributes:
        experts: number of LoRA experts; `auto` trains the stage once with 16, and then with one per cluster of users,
            by the users' router scores.
        rank: rank of each expert.
        alpha: the output of an expert is multiplied by alpha / rank.
        dropout: dropout rate on the experts' input.
        target_modules: layers that get experts and user adapters: a group of them, or a list of names.
        layers: decoder layers that get experts: `all`, or N (also written `last N`) for the last N. With N, training
            computes the layers below only once per text.
        user_embedding: size of a user embedding.
        embedding: one embedding per user for all layers, or one per layer.
        embedding_init: standard deviation of the user embeddings' initial values; the mean is 0.
        embedding_learning_rate: learning rate of the user embeddings.
        router: form of the user-aware router: a softmax of the sum, or that of the released code.
        task_experts: with several `tasks`, whether all tasks share all experts, or expert i serves only task i modulo
            their number.
        constraint: penalty that keeps the mixtures of users apart.
        user_encoder: train, after this stage, an encoder that places a new user's embedding from their first items.
        train_on: the histories of all users, or of target users.
        max_tokens: budget of training tokens, sampled evenly over users; null means all.
    """

    experts: Count | Literal["auto"] = 5
    rank: Count = 4
    alpha: Positive = 8
    dropout: Fraction = 0.05
    target_modules: TargetModules = "ffn"
    layers: LastLayers = "all"
    user_embedding: Count = 128
    embedding: Literal["shared", "per-module"] = "shared"
    embedding_init: Positive = 1.0
    embedding_learning_rate: Positive = 1e-2
    router: Literal["default", "released"] = "default"
    task_experts: Literal["shared", "separate"] = "shared"
    constraint: ConstraintConfig = ConstraintConfig()
    user_encoder: bool = True
    train_on: Literal["all", "targets"] = "all"
    max_tokens: Count | None = None

    @property
    def expert_count(self) -> int:
        """The number of experts that are added to the model; with `auto`, that of the first training."""
        return MAX_EXPERTS if self.experts == "auto" else self.experts

    @model_validator(mode="after")
    def _tasks_have_a_fixed_number_of_experts(self) -> GroupsConfig:
        if self.task_experts == "separate" and self.experts == "auto":
            raise ValueError("task_experts: separate assigns experts to tasks, and needs a number in `experts`")
        return self

    @model_validator(mode="after")
    def _released_router_uses_every_expert(self) -> GroupsConfig:
        if self.task_experts == "separate" and self.router == "released":
            raise ValueError("task_experts: separate needs router: default, since the released one has no gate of 0")
        return self


class TiersConfig(Section):
    """Conditions under which a user gets an adapter of their own.

    Attributes:
        select: give a user an adapter only if it helps on held-out items; false gives one to every target user.
        validation: share of a user's history that is held out for the decision.
        pool_below: below this many items, the user's gain is shrunk toward the mean gain of users with similar
            embeddings, by its variance; null means always. From this many items on, the user's own gain decides.
        neighbours: number of users with similar embeddings whose mean gain is taken.
    """

    select: bool = True
    validation: Annotated[float, Field(gt=0, le=0.5)] = 0.2
    pool_below: Annotated[int, Field(ge=0)] | None = None
    neighbours: Count = 50

    def pools(self, items: int) -> bool:
        """Return whether the decision on a user with so many items is pooled."""
        return self.pool_below is None or items < self.pool_below


class UsersConfig(OptimizerConfig):
    """Stage 3: one LoRA per user (3a), then the LoRA-aware router (3b).

    A config that sets `epochs` and not `steps` trains for these epochs. `gradient_accumulation` and
    `gradient_checkpointing` are not used.

    Attributes:
        steps: optimizer steps of a user's full training, rounded up to whole passes over the user's items; null means
            `epochs` passes.
        form: form of a user's adapter: `lora`, an A and a B per module, or `core`, a matrix of rank x rank per module
            between an A and a B that all users share. These bases are trained first, on the older items of the users.
        start: initial value of a user's adapter: `zero`; `neighbours`, for users fitted after stage 3 the mean adapter
            of the nearest users by embedding; or `meta`, a start learnt on the users of stage 3.
        rank: rank of a user's LoRA, in either form.
        alpha: the output of a user's LoRA is multiplied by alpha / rank.
        dropout: dropout rate on the LoRA's input.
        layers: decoder layers that get user adapters: `all` that have experts, or N (also written `last N`) for the
            last N of these.
        patience: measurements, of four over a user's trial, without a lower held-out loss at any scale after which the
            user leaves the trial.
        scales: factors on a trial's adapter, beside 1, at which the held-out loss is measured. One number of passes and
            one factor are chosen for all users, by the mean gain over users minus its standard error, and the factor
            goes into the stored adapters.
        distance: weight of |s_u B_u A_u|_F^2, summed over modules, in the loss of a user's LoRA, which keeps it near
            the group model; 0 switches it off.
        router: form of the LoRA-aware router: added to stage 2's scores, the paper's, or none.
        router_input: input of the LoRA-aware router: a user's h_u unchanged, or divided by its typical magnitude.
        router_items: rows that train the LoRA-aware router: all history rows, which the adapters were trained on, or
            the held-out items of the trials with the trials' adapters, which were not trained on them.
        router_learning_rate: learning rate of the LoRA-aware router; `auto` as for `learning_rate`.
        router_epochs: passes over the histories for the router.
        slots: users who train at the same time; `auto` chooses by the device's memory.
        max_items: maximum number of history rows that a user's adapter is trained on, the newest ones; null means all.
        storage: number format of the stored adapters; int8 and int4 have a scale for every few numbers.
        tiers: conditions under which a user gets an adapter.
        update: how new interactions change a user's adapter.
        drift: when a user counts as drifted.
    """

    form: Literal["lora", "core"] = "lora"
    start: Literal["zero", "neighbours", "meta"] = "zero"
    rank: Count = 4
    alpha: Positive = 8
    dropout: Fraction = 0.0
    layers: LastLayers = "all"
    batch_size: Count = 2
    steps: Count | None = 20
    patience: Count = 1
    scales: Annotated[list[Annotated[float, Field(gt=0, lt=1)]], Field(max_length=8)] = [0.25, 0.5]
    distance: Annotated[float, Field(ge=0)] = 0.0
    router: Literal["residual", "paper", "none"] = "none"
    router_input: Literal["raw", "normalized"] = "raw"
    router_items: Literal["history", "held-out"] = "history"
    router_learning_rate: Rate = "auto"
    router_epochs: Count = 1
    slots: Literal["auto"] | Count = "auto"
    max_items: Count | None = None
    storage: Literal["bf16", "int8", "int4", "fp32"] = "bf16"
    tiers: TiersConfig = TiersConfig()
    update: UpdateConfig = UpdateConfig()
    drift: DriftConfig = DriftConfig()

    @property
    def router_on_held_out(self) -> bool:
        """Whether the LoRA-aware router is trained on the trials' held-out items."""
        return self.router_items == "held-out" and self.tiers.select

    @property
    def adapter_shape(self) -> dict[str, str]:
        """The settings that fix which tensors an adapter has; an adapter store is bound to them."""
        shape = {"rank": str(self.rank), "users.layers": str(self.layers)}
        return shape if self.form == "lora" else {**shape, "users.form": self.form}

    @model_validator(mode="before")
    @classmethod
    def _epochs_instead_of_steps(cls, raw: object) -> object:
        """Let given epochs replace the default number of steps."""
        return {"steps": None, **raw} if isinstance(raw, dict) and "epochs" in raw else raw
