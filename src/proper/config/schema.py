"""Settings of a run as pydantic models: every key of the YAML config, its type, its limits and its default.

An unknown key, a wrong type or an impossible value is an error that names the key; for an unknown key it suggests the
nearest known one.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from typing import Annotated, Any, Literal

from pydantic import Field, field_validator, model_validator

from proper.config.data import DataConfig, TaskConfig, TaskSpec
from proper.config.privacy import PrivacyConfig, private_defaults
from proper.config.section import Count, Positive, Section
from proper.config.stages import GroupsConfig, PopulationConfig, UsersConfig
from proper.errors import ConfigError
from proper.run_folder import Stage


class SplitConfig(Section):
    """Split of users into targets and others, and of the targets' interactions into history and queries.

    Attributes:
        target_users: number of users who get adapters and queries: those with the longest histories.
        min_history: minimum number of history rows of a target user, in addition to the queries; `shared_items` may
            leave some of them out afterwards.
        queries: share of a target user's rows that become queries.
        by: how queries are chosen: each user's newest rows, all rows after one date, whole items, or at random.
        shared_items: whether a row may be trained on if its item or input is a query of any user; `auto` is `exclude`
            for generation tasks.
        max_queries: maximum number of queries, sampled evenly over users; null means no limit.
        evaluate_on: the queries, or a validation part of the histories to choose settings on.
        seed: seed of everything random in the split.
    """

    target_users: Count = 100
    min_history: Count = 10
    queries: Annotated[float, Field(gt=0, lt=1)] = 0.2
    by: Literal["time", "time-global", "item", "random"] = "time"
    shared_items: Literal["auto", "exclude", "allow"] = "auto"
    max_queries: Count | None = None
    evaluate_on: Literal["queries", "validation"] = "queries"
    seed: int = 0


def seconds_of(time: str) -> float:
    """Return the seconds of a time as in 40m, 2h, 90s or 1h30m.

    Raises:
        ValueError: it is no such time, or none at all.
    """
    number = r"(?:(\d+(?:\.\d+)?){})?"
    found = re.fullmatch("".join(map(number.format, "hms")), time.replace(" ", ""))
    parts = [float(part or 0) for part in found.groups()] if found else [0.0]
    if not any(parts):
        raise ValueError(f"'{time}' is not a time, as in 40m, 2h or 1h30m")
    hours, minutes, seconds = parts
    return 3600 * hours + 60 * minutes + seconds


class ComputeConfig(Section):
    """Precision, device, sequence length, inference batch size and checkpoint interval.

    Attributes:
        dtype: precision of the backbone; `auto` is bf16. Trained tensors and softmaxes are always fp32.
        device: torch device; `auto` takes a GPU if there is one.
        max_length: longest prompt with its answer, in tokens; longer ones are cut.
        batch_size: rows of a batch in evaluation.
        batch_tokens: maximum number of tokens, padding included, that run through the backbone at once in training and
            evaluation; a larger batch is computed in parts, with the same result. `auto` chooses by the backbone's
            size, so that memory is bounded.
        checkpoint_seconds: time between two checkpoints of a stage, in seconds.
        cache_mb: limit in MiB, and at most half of the free disk space, of the cache of hidden states in training,
            which is used if `groups.layers` leaves lower layers without experts; 0 switches the cache off.
        budget: time for the whole run, as in 40m, 2h or 1h30m; null means no limit. The tokens of stages 1 and 2, then
            steps and items per user, then queries are lowered until the estimated time fits.
        cut: the settings that the budget lowered, with their original values; written by the run.
    """

    dtype: Literal["auto", "bf16", "fp32"] = "auto"
    device: str = "auto"
    max_length: Annotated[int, Field(ge=8)] = 256
    batch_size: Count = 32
    batch_tokens: Literal["auto"] | Count = "auto"
    checkpoint_seconds: Positive = 30.0
    cache_mb: Annotated[int, Field(ge=0)] = 4096
    budget: str | None = None
    cut: dict[str, int | None] = {}

    @field_validator("budget")
    @classmethod
    def _is_a_time(cls, budget: str | None) -> str | None:
        if budget is not None:
            seconds_of(budget)
        return budget


SliceName = Literal[
    "history-q1",
    "history-q2",
    "history-q3",
    "history-q4",
    "bottom-100",
    "under-10",
    "new-to-groups",
    "items-seen-by-others",
    "items-unseen-by-others",
]


class EvaluationConfig(Section):
    """Methods to compare, seeds, and resamples of the confidence intervals.

    Attributes:
        methods: methods of the table; see `proper evaluate`.
        seeds: a run of all stages for each; results are averaged per user first.
        resamples: bootstrap resamples of the intervals; paired tests always draw 10,000 permutations.
        examples: answers shown in the report.
        slices: subsets of users and queries that are scored too: all, or some of history-q1 to history-q4, bottom-100,
            under-10, new-to-groups, items-seen-by-others and items-unseen-by-others.
    """

    methods: Annotated[list[str], Field(min_length=1)] = [str(stage) for stage in Stage]
    seeds: Annotated[list[int], Field(min_length=1)] = [0]
    resamples: Annotated[int, Field(ge=100)] = 2000
    examples: Annotated[int, Field(ge=0)] = 8
    slices: Literal["all"] | list[SliceName] = "all"

    @field_validator("seeds")
    @classmethod
    def _distinct(cls, seeds: list[int]) -> list[int]:
        if len(set(seeds)) != len(seeds):
            raise ValueError("seeds must be distinct")
        return seeds


class RetrievalConfig(Section):
    """Items of a user's own earlier history that the methods `rag` and `users+rag` prepend to prompts.

    Attributes:
        kind: how items are found: by words (BM25), by the frozen backbone's hidden states, or by both rankings.
        k: maximum number of items that are prepended to a prompt.
        max_length: longest prompt with its items and its answer in these methods, in tokens; null means
            compute.max_length.
    """

    kind: Literal["bm25", "embedding", "both"] = "bm25"
    k: Count = 4
    max_length: Annotated[int, Field(ge=8)] | None = None


class Config(Section):
    """All settings of a run.

    Attributes:
        preset: a set of other defaults: the paper's settings, or those of the released code.
        backbone: `proper-nano`, another short name, a Hugging Face id, a local folder or a GGUF file.
        trust_remote_code: run the Python code that some backbones ship beside their weights; without it such a
            backbone is refused.
        tasks: several tasks of overlapping users in one run, by name, each with its own `data` and `task`; instead of
            the sections `data` and `task`, which then are those of the first.
    """

    preset: Literal["paper", "released"] | None = None
    data: DataConfig
    task: TaskConfig = TaskConfig()
    tasks: dict[str, TaskSpec] = {}
    split: SplitConfig = SplitConfig()
    backbone: str = "proper-nano"
    trust_remote_code: bool = False
    compute: ComputeConfig = ComputeConfig()
    population: PopulationConfig = PopulationConfig()
    groups: GroupsConfig = GroupsConfig()
    users: UsersConfig = UsersConfig()
    privacy: PrivacyConfig = PrivacyConfig()
    retrieval: RetrievalConfig = RetrievalConfig()
    evaluation: EvaluationConfig = EvaluationConfig()

    @property
    def each_task(self) -> dict[str, Config]:
        """The config of each task alone, by name; this config under "" for a run of one task."""
        return {
            name: self.model_copy(update={"data": one.data, "task": one.task, "tasks": {}})
            for name, one in self.tasks.items()
        } or {"": self}

    @property
    def unescaped(self) -> list[str]:
        """A sentence for each template with a backslash and an n: YAML reads a line break in double quotes only."""
        return [
            f"{f'tasks.{name}.' if name else ''}data.{key} has a backslash and an n instead of a line break: YAML "
            "needs double quotes for that"
            for name, one in self.each_task.items()
            for key in ("prompt", "target")
            if r"\n" in getattr(one.data, key)
        ]

    def task_number(self, name: str | None) -> int:
        """Return the number of a task, from 0, as rows have it; the first one's for None.

        Raises:
            ConfigError: there is no such task.
        """
        if name is None:
            return 0
        if name not in self.tasks:
            there = f"the tasks are {', '.join(self.tasks)}" if self.tasks else "this run has one task, without a name"
            raise ConfigError(f"no task {name!r}; {there}")
        return list(self.tasks).index(name)

    def with_data(self, change: Callable[[DataConfig], DataConfig]) -> Config:
        """Return this config with the data section of every task changed."""
        tasks = {name: one.model_copy(update={"data": change(one.data)}) for name, one in self.tasks.items()}
        return self.model_copy(update={"data": change(self.data), "tasks": tasks})

    @field_validator("backbone")
    @classmethod
    def _names_a_backbone(cls, backbone: str) -> str:
        if not backbone.strip():
            raise ValueError("empty")
        return backbone

    @model_validator(mode="before")
    @classmethod
    def _first_task(cls, raw: Any) -> Any:
        """Fill the sections `data` and `task` with those of the first of several tasks."""
        tasks = raw.get("tasks") if isinstance(raw, dict) else None
        first = next(iter(tasks.values())) if isinstance(tasks, dict) and tasks else None
        return (
            {**{key: first[key] for key in ("data", "task") if key in first}, **raw} if isinstance(first, dict) else raw
        )

    @model_validator(mode="before")
    @classmethod
    def _private_defaults(cls, raw: Any) -> Any:
        return private_defaults(raw) if isinstance(raw, dict) else raw

    @model_validator(mode="after")
    def _privacy_covers_the_rest(self) -> Config:
        key, why = next(_against_privacy(self), ("", "")) if self.privacy.on else ("", "")
        if key:
            raise ValueError(f"privacy: {key} {why}")
        return self

    @model_validator(mode="after")
    def _tasks_have_the_data(self) -> Config:
        first = next(iter(self.tasks.values()), None)
        if first is not None and (self.data, self.task) != (first.data, first.task):
            raise ValueError("tasks: each has its own data and task; leave the sections data and task out")
        if any(one.data.given_split for one in self.tasks.values()):
            raise ValueError("tasks: a benchmark's files (format: lamp or oppu) are data of one task")
        if any("" in (name, name.strip()) for name in self.tasks):
            raise ValueError("tasks: a task needs a name")
        if not self.tasks and self.data.task_column is not None:
            raise ValueError("data.task_column: names the tasks of a file, and the config has no `tasks`")
        return self

    @model_validator(mode="after")
    def _items_need_room(self) -> Config:
        longest = self.retrieval.max_length
        if longest is not None and longest < self.compute.max_length:
            raise ValueError(f"retrieval.max_length: {longest} is below compute.max_length, {self.compute.max_length}")
        return self

    @model_validator(mode="after")
    def _users_have_experts(self) -> Config:
        groups, users = self.groups.layers, self.users.layers
        if groups != "all" and users != "all" and users > groups:
            raise ValueError(f"users.layers: {users} is more than the {groups} layers with experts (groups.layers)")
        return self


def _against_privacy(config: Config) -> Iterator[tuple[str, str]]:
    """Yield every setting that privacy excludes, as the key with its value, and why with what to set."""
    population, groups, users = config.population, config.groups, config.users
    if population.patience:
        yield f"population.patience: {population.patience}", "stops on held-out rows without noise; set it to 0"
    for name, stage in (("population", population), ("groups", groups)):
        if stage.max_tokens is not None:
            why = "lets one user decide which rows of others are trained on; lower epochs or privacy.rows_per_user"
            yield f"{name}.max_tokens: {stage.max_tokens}", why
    if config.compute.budget is not None:
        yield f"compute.budget: {config.compute.budget}", "lowers max_tokens; leave it out"
    if groups.constraint.kind == "users":
        yield "groups.constraint.kind: users", "compares users with one another; set it to none or experts"
    if groups.experts == "auto":
        yield "groups.experts: auto", "counts clusters of users without noise; set a number"
    if groups.user_encoder:
        yield "groups.user_encoder: true", "learns from all users' embeddings without noise; set it to false"
    if users.router != "none":
        yield f"users.router: {users.router}", "is trained on all users without noise; set it to none"
    if users.form != "lora":
        yield f"users.form: {users.form}", "needs bases that are trained on all users without noise; set it to lora"
    if users.start != "zero":
        yield f"users.start: {users.start}", "starts a user from what others' adapters learned; set it to zero"
    if len(config.evaluation.seeds) > 1:
        yield f"evaluation.seeds: {config.evaluation.seeds}", "train several models, and epsilon is that of one"
    if config.tasks:
        yield "tasks", "weigh rows by the mean length of all users' answers; make one run for each task"
