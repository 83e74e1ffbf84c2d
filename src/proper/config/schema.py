"""Settings of a run as pydantic models: every key of the YAML config, its type, its limits and its default.

An unknown key, a wrong type or an impossible value is an error that names the key; for an unknown key it suggests the
nearest known one.
"""

from __future__ import annotations

from typing import Annotated, Literal, get_args

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from proper.config.lamp_tasks import GIVEN_FORMATS, LampName, Layout, lamp_name
from proper.run_folder import Stage

Fraction = Annotated[float, Field(ge=0, lt=1)]
Positive = Annotated[float, Field(gt=0)]
Count = Annotated[int, Field(ge=1)]
Rate = Positive | Literal["auto"]


class Section(BaseModel):
    """Base of all config sections: frozen, and unknown keys are refused."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False, validate_default=True)


class DataConfig(Section):
    """Location, format and columns of the interactions.

    For `format` lamp or oppu, `path` is a folder of the benchmark's files, `task` is their task and `layout` the
    wording of the prompts; the columns are the task's own.

    `chat` selects whether prompts use the tokenizer's chat template, in training and in serving: `off` means never.
    """

    path: str
    format: Literal["auto", "jsonl", "csv", "parquet", "huggingface", "lamp", "oppu"] = "auto"
    task: LampName | None = None
    layout: Layout = "official"
    name: str | None = None
    part: str = "train"
    user: str = "user_id"
    time: str | None = "timestamp"
    item: str | None = "item_id"
    prompt: str = "{input}"
    target: str = "{output}"
    chat: Literal["off"] = "off"

    @property
    def given_split(self) -> bool:
        """Whether the data files define which rows are queries."""
        return self.format in GIVEN_FORMATS

    @field_validator("task", mode="before")
    @classmethod
    def _spelling(cls, task: object) -> object:
        return lamp_name(task) if isinstance(task, str) else task

    @field_validator("chat", mode="before")
    @classmethod
    def _word(cls, chat: object) -> object:
        """Return "off" for False, because YAML reads the word `off` as False."""
        return "off" if chat is False else chat

    @model_validator(mode="after")
    def _task_goes_with_format(self) -> DataConfig:
        if self.given_split and self.task is None:
            raise ValueError(f"format: '{self.format}' needs data.task, one of {', '.join(get_args(LampName))}")
        if self.task is not None and not self.given_split:
            raise ValueError(f"task: '{self.task}' goes with format: lamp or oppu, not '{self.format}'")
        return self


class TaskConfig(Section):
    """Kind of task, labels and decoding."""

    kind: Literal["classification", "rating", "generation"] = "generation"
    labels: Literal["auto"] | Annotated[list[str], Field(min_length=2)] = "auto"
    decode: Literal["auto", "generate", "score"] = "auto"
    max_new_tokens: Count = 48

    @property
    def scored(self) -> bool:
        """Whether labels are scored by likelihood (the default for tasks with labels)."""
        return self.kind != "generation" and self.decode != "generate"

    @model_validator(mode="after")
    def _score_needs_labels(self) -> TaskConfig:
        if self.kind == "generation" and self.decode == "score":
            raise ValueError("decode: 'score' needs labels, and a generation task has none")
        return self


class SplitConfig(Section):
    """Split of users into targets and others, and of the targets' interactions into history and queries."""

    target_users: Count = 100
    min_history: Count = 10
    queries: Annotated[float, Field(gt=0, lt=1)] = 0.2
    by: Literal["time", "time-global", "item", "random"] = "time"
    shared_items: Literal["auto", "exclude", "allow"] = "auto"
    max_queries: Count | None = None
    evaluate_on: Literal["queries", "validation"] = "queries"
    seed: int = 0


class ComputeConfig(Section):
    """Precision, device, sequence length, inference batch size and checkpoint interval."""

    dtype: Literal["auto", "bf16", "fp32"] = "auto"
    device: str = "auto"
    max_length: Annotated[int, Field(ge=8)] = 256
    batch_size: Count = 32
    checkpoint_seconds: Positive = 30.0


class OptimizerConfig(Section):
    """Optimizer settings of every stage; `learning_rate: auto` scales the paper's rate by 4096 / hidden size."""

    epochs: Annotated[float, Field(gt=0)] = 2
    batch_size: Count = 16
    learning_rate: Rate = "auto"
    weight_decay: Annotated[float, Field(ge=0)] = 0.0
    warmup: Fraction = 0.03
    schedule: Literal["cosine", "linear", "constant"] = "cosine"
    clip: Positive = 1.0
    gradient_accumulation: Count = 1
    gradient_checkpointing: bool = False


TargetModules = Literal["auto", "ffn", "attention", "all"] | list[str]


class PopulationConfig(OptimizerConfig):
    """Stage 1: one LoRA trained on all users' histories and merged into the backbone."""

    rank: Count = 8
    alpha: Positive = 16
    dropout: Fraction = 0.05
    target_modules: TargetModules = "all"
    epochs: Annotated[float, Field(gt=0)] = 3
    weight_decay: Annotated[float, Field(ge=0)] = 0.1
    train_on: Literal["all", "others"] = "all"
    max_tokens: Count | None = None


class ConstraintConfig(Section):
    """Regularization term that keeps the expert mixtures of different users apart."""

    kind: Literal["users", "experts", "released", "none"] = "users"
    weight: Annotated[float, Field(ge=0)] = 0.01
    warmup: Fraction = 0.1


class GroupsConfig(OptimizerConfig):
    """Stage 2: LoRA experts shared by all users, mixed by a user-aware router."""

    experts: Count = 5
    rank: Count = 4
    alpha: Positive = 8
    dropout: Fraction = 0.05
    target_modules: TargetModules = "ffn"
    user_embedding: Count = 128
    embedding: Literal["shared", "per-module"] = "shared"
    embedding_learning_rate: Positive = 1e-2
    router: Literal["default", "released"] = "default"
    constraint: ConstraintConfig = ConstraintConfig()
    train_on: Literal["all", "targets"] = "all"
    max_tokens: Count | None = None


class TiersConfig(Section):
    """Conditions under which a user gets an adapter of their own."""

    select: bool = True
    validation: Annotated[float, Field(gt=0, le=0.5)] = 0.2
    pool_below: Annotated[int, Field(ge=0)] = 10
    neighbours: Count = 20


class UsersConfig(OptimizerConfig):
    """Stage 3: one LoRA per user (3a), then the LoRA-aware router (3b)."""

    rank: Count = 4
    alpha: Positive = 8
    dropout: Fraction = 0.0
    batch_size: Count = 4
    patience: Count = 2
    router: Literal["residual", "paper", "none"] = "residual"
    router_learning_rate: Rate = "auto"
    router_epochs: Count = 1
    slots: Literal["auto"] | Count = "auto"
    max_items: Count | None = None
    storage: Literal["bf16", "int8", "fp32"] = "bf16"
    tiers: TiersConfig = TiersConfig()


class EvaluationConfig(Section):
    """Methods to compare, seeds, and resamples of the confidence intervals."""

    methods: Annotated[list[str], Field(min_length=1)] = [str(stage) for stage in Stage]
    seeds: Annotated[list[int], Field(min_length=1)] = [0]
    resamples: Annotated[int, Field(ge=100)] = 2000
    examples: Annotated[int, Field(ge=0)] = 8

    @field_validator("seeds")
    @classmethod
    def _distinct(cls, seeds: list[int]) -> list[int]:
        if len(set(seeds)) != len(seeds):
            raise ValueError("seeds must be distinct")
        return seeds


class Config(Section):
    """All settings of a run.

    `trust_remote_code` allows running the Python code that some backbones ship beside their weights; without it such a
    backbone is refused without a prompt.
    """

    preset: Literal["paper", "released"] | None = None
    data: DataConfig
    task: TaskConfig = TaskConfig()
    split: SplitConfig = SplitConfig()
    backbone: str = "proper-nano"
    trust_remote_code: bool = False
    compute: ComputeConfig = ComputeConfig()
    population: PopulationConfig = PopulationConfig()
    groups: GroupsConfig = GroupsConfig()
    users: UsersConfig = UsersConfig()
    evaluation: EvaluationConfig = EvaluationConfig()
