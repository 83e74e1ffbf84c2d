"""What a run can be told, with every default in one place.

A config is a small YAML file. An unknown key, a wrong type or an impossible value is an error that names the key
and suggests the nearest one. Knows nothing about how the settings are used.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from proper.config_errors import explain
from proper.errors import ConfigError
from proper.lamp_tasks import GIVEN_FORMATS, LampName, Layout, lamp_defaults, lamp_name

Fraction = Annotated[float, Field(ge=0, lt=1)]
Positive = Annotated[float, Field(gt=0)]
Count = Annotated[int, Field(ge=1)]
Rate = Positive | Literal["auto"]


class Section(BaseModel):
    """A part of the config: frozen, and closed to keys it does not know."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False, validate_default=True)


class DataConfig(Section):
    """Where the interactions are and which columns they have.

    For `format` lamp or oppu, `path` is a folder of the benchmark's files, `task` says which task they are of and
    `layout` how prompts are worded; the columns are the task's own.

    `chat` says whether prompts are written by the tokenizer's chat template, in training as in serving: `off`, never.
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
        """Whether the files say themselves which rows are queries."""
        return self.format in GIVEN_FORMATS

    @field_validator("task", mode="before")
    @classmethod
    def _spelling(cls, task: object) -> object:
        return lamp_name(task) if isinstance(task, str) else task

    @field_validator("chat", mode="before")
    @classmethod
    def _word(cls, chat: object) -> object:
        """Return the word that YAML reads as a truth value: `off` is one of its names for false."""
        return "off" if chat is False else chat

    @model_validator(mode="after")
    def _task_goes_with_format(self) -> DataConfig:
        if self.given_split and self.task is None:
            raise ValueError(f"format: '{self.format}' needs data.task, one of {', '.join(get_args(LampName))}")
        if self.task is not None and not self.given_split:
            raise ValueError(f"task: '{self.task}' goes with format: lamp or oppu, not '{self.format}'")
        return self


class TaskConfig(Section):
    """What is predicted, and how an answer is read off the model."""

    kind: Literal["classification", "rating", "generation"] = "generation"
    labels: Literal["auto"] | Annotated[list[str], Field(min_length=2)] = "auto"
    decode: Literal["auto", "generate", "score"] = "auto"
    max_new_tokens: Count = 48

    @property
    def scored(self) -> bool:
        """Whether labels are compared by likelihood (the default wherever there are labels)."""
        return self.kind != "generation" and self.decode != "generate"

    @model_validator(mode="after")
    def _score_needs_labels(self) -> TaskConfig:
        if self.kind == "generation" and self.decode == "score":
            raise ValueError("decode: 'score' needs labels, and a generation task has none")
        return self


class SplitConfig(Section):
    """Which users are targets, and which of their interactions are history or query."""

    target_users: Count = 100
    min_history: Count = 10
    queries: Annotated[float, Field(gt=0, lt=1)] = 0.2
    by: Literal["time", "time-global", "item", "random"] = "time"
    shared_items: Literal["auto", "exclude", "allow"] = "auto"
    max_queries: Count | None = None
    evaluate_on: Literal["queries", "validation"] = "queries"
    seed: int = 0


class ComputeConfig(Section):
    """Number types, devices and lengths."""

    dtype: Literal["auto", "bf16", "fp32"] = "auto"
    device: str = "auto"
    max_length: Annotated[int, Field(ge=8)] = 256
    batch_size: Count = 32
    checkpoint_seconds: Positive = 30.0


class OptimizerConfig(Section):
    """What every training stage has. `learning_rate: auto` scales the paper's rate by 4096 / hidden size."""

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
    """Stage 1: one LoRA on everybody's histories, merged into the backbone."""

    rank: Count = 8
    alpha: Positive = 16
    dropout: Fraction = 0.05
    target_modules: TargetModules = "all"
    epochs: Annotated[float, Field(gt=0)] = 3
    weight_decay: Annotated[float, Field(ge=0)] = 0.1
    train_on: Literal["all", "others"] = "all"
    max_tokens: Count | None = None


class ConstraintConfig(Section):
    """Keeps different users' mixtures apart."""

    kind: Literal["users", "experts", "released", "none"] = "users"
    weight: Annotated[float, Field(ge=0)] = 0.01
    warmup: Fraction = 0.1


class GroupsConfig(OptimizerConfig):
    """Stage 2: experts shared by everybody, mixed by a user-aware router."""

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
    """When a user gets an adapter of their own."""

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
    """What is compared, and with how many repeats."""

    methods: Annotated[list[str], Field(min_length=1)] = ["population", "groups", "users"]
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
    """Everything a run can be told.

    `trust_remote_code` runs the Python code that some backbones bring beside their weights; without it such a backbone
    is refused, and nothing asks.
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


_PAPER: dict[str, Any] = {
    "population": {"learning_rate": 3e-4, "train_on": "others"},
    "groups": {"learning_rate": 2e-4, "train_on": "targets"},
    "users": {"learning_rate": 2e-4, "router_learning_rate": 2e-4, "router": "paper"},
}

PRESETS: dict[str, dict[str, Any]] = {
    "paper": _PAPER,
    "released": {
        **_PAPER,
        "population": {**_PAPER["population"], "target_modules": "attention"},
        "groups": {
            **_PAPER["groups"],
            "router": "released",
            "embedding": "per-module",
            "constraint": {"kind": "released"},
        },
    },
}


def load_config(path: Path, overrides: Sequence[str] = ()) -> Config:
    """Read a YAML config and apply `key.subkey=value` overrides, which win over the file, which wins over a preset.

    A relative `data.path` or `backbone` folder that does not exist from here is looked up beside the config file.

    Raises:
        ConfigError: the file is missing or not YAML, a key is unknown, a value impossible.
    """
    try:
        raw = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read: {error.strerror}") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        line = getattr(getattr(error, "problem_mark", None), "line", None)
        where = f"{path}:{line + 1}" if line is not None else str(path)
        problem = getattr(error, "problem", None) or str(error).splitlines()[0]
        raise ConfigError(f"{where}: not YAML: {problem}") from error
    if not isinstance(raw, dict):
        found = "empty" if raw is None else f"a {type(raw).__name__}"
        raise ConfigError(f"{path}: a config is a mapping of sections, this is {found}")
    for override in overrides:
        _apply(raw, override)
    _resolve_paths(raw, path.parent)
    return make_config(raw, str(path))


def make_config(raw: dict[str, Any], source: str = "config") -> Config:
    """Turn nested plain values into a `Config`, with the named preset underneath.

    Raises:
        ConfigError: a key is unknown or a value impossible; the message names the key as `section.key`.
    """
    preset = raw.get("preset")
    merged = _merge(PRESETS[preset], raw) if isinstance(preset, str) and preset in PRESETS else raw
    merged = _merge(lamp_defaults(raw.get("data")), merged)
    try:
        return Config.model_validate(merged)
    except ValidationError as error:
        raise ConfigError(f"{source}: {explain(error, Config)}") from error


def _apply(raw: dict[str, Any], override: str) -> None:
    key, separator, text = override.partition("=")
    if not separator or not key.strip():
        raise ConfigError(f"--set {override}: write it as section.key=value")
    *sections, last = key.strip().split(".")
    place = raw
    for section in sections:
        inner = place.get(section)
        if not isinstance(inner, dict):
            inner = place[section] = {}
        place = inner
    try:
        place[last] = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ConfigError(f"--set {override}: the value is not YAML") from error


def _resolve_paths(raw: dict[str, Any], folder: Path) -> None:
    data = raw.get("data")
    places = [(data, "path")] if isinstance(data, dict) else []
    for place, key in [*places, (raw, "backbone")]:
        value = place.get(key)
        if isinstance(value, str) and not Path(value).exists() and (folder / value).exists():
            place[key] = str((folder / value).resolve())


def _merge(under: dict[str, Any], over: dict[str, Any]) -> dict[str, Any]:
    merged = dict(under)
    for key, value in over.items():
        below = merged.get(key)
        merged[key] = _merge(below, value) if isinstance(below, dict) and isinstance(value, dict) else value
    return merged
