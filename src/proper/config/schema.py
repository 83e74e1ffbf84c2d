"""Settings of a run as pydantic models: every key of the YAML config, its type, its limits and its default.

An unknown key, a wrong type or an impossible value is an error that names the key; for an unknown key it suggests the
nearest known one.
"""

from __future__ import annotations

import re
from typing import Annotated, Literal, get_args

from pydantic import Field, field_validator, model_validator

from proper.config.lamp_tasks import GIVEN_FORMATS, LampName, Layout, lamp_name
from proper.config.stages import Count, GroupsConfig, PopulationConfig, Positive, Section, UsersConfig
from proper.run_folder import Stage


class DataConfig(Section):
    """Location, format and columns of the interactions.

    For `format` lamp or oppu, `path` is a folder of the benchmark's files, `task` is their task and `layout` the
    wording of the prompts; the columns are the task's own.

    Attributes:
        path: file, folder or Hugging Face name; relative to the current folder, else to the config's folder.
        format: format of the files; `auto` goes by the file's name.
        task: the benchmark's task, for `format` lamp or oppu.
        layout: wording of the benchmark's prompts: LaMP's own, or OPPU's.
        name: configuration of a Hugging Face data set that has several.
        part: split of a Hugging Face data set to read.
        user: column of the user's id.
        time: column of the time; null if there is none.
        item: column of the item that a row is about; null if there is none.
        prompt: template of the prompt; `{column}` is replaced by the row's value. `{item_mean}` (ratings),
            `{item_usual}` (labels) and `{item_count}` are what other users' histories say of the row's item.
        target: template of the answer.
        rows: what a row holds: the templates' columns; `messages`, a list of objects with role and content, of which
            the last assistant's is the answer; or `completion`, TRL's columns prompt and completion, as texts or lists
            of messages. `auto` takes the conversation where no template is given and the default templates' columns
            are missing.
        train_without: file of user ids, one a line; their rows are left out when a run reads its data, so that no
            stage, method or evaluation uses them. Relative to the current folder, else to the config's folder.
        assistant_loss: whether training counts the last assistant's message of a conversation, or all of them.
        chat: whether prompts use the backbone's chat template, in training, evaluation, `generate` and serving alike;
            `auto` means if its tokenizer has one. A run stores the choice as `on` or `off`.
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
    rows: Literal["auto", "template", "messages", "completion"] = "auto"
    assistant_loss: Literal["last", "all"] = "last"
    chat: Literal["auto", "on", "off"] = "auto"
    train_without: str | None = None

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
        """Return "on" and "off" for the values that YAML reads these words as."""
        return {True: "on", False: "off"}[chat] if isinstance(chat, bool) else chat

    @model_validator(mode="after")
    def _task_goes_with_format(self) -> DataConfig:
        if self.given_split and self.task is None:
            raise ValueError(f"format: '{self.format}' needs data.task, one of {', '.join(get_args(LampName))}")
        if self.task is not None and not self.given_split:
            raise ValueError(f"task: '{self.task}' goes with format: lamp or oppu, not '{self.format}'")
        return self


class TaskConfig(Section):
    """Kind of task, labels and decoding.

    Attributes:
        kind: what the answers are: labels, numbers or free text.
        labels: the labels; `auto` takes those of the training rows.
        decode: `score` compares the likelihood of all labels, `generate` decodes text; `auto` scores where there are
            labels.
        max_new_tokens: longest generated answer, in tokens.
    """

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
    """Split of users into targets and others, and of the targets' interactions into history and queries.

    Attributes:
        target_users: number of users who get adapters and queries: those with the longest histories.
        min_history: fewest history rows of a target user.
        queries: share of a target user's rows that become queries.
        by: how queries are chosen: each user's newest rows, all rows after one date, whole items, or at random.
        shared_items: whether a row may be trained on if its item or input is a query of any user; `auto` is `exclude`
            for generation tasks.
        max_queries: most queries in all, sampled evenly over users; null means no limit.
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
        batch_tokens: most tokens, padding included, that run through the backbone at once in training and evaluation; a
            larger batch is computed in parts, with the same result. `auto` goes by the backbone's size, so that memory
            stays bounded.
        checkpoint_seconds: time between two checkpoints of a stage, in seconds.
        cache_mb: most MiB of disk, and at most half of what is free, for hidden states of texts during training, used
            where `groups.layers` leaves lower layers without experts; 0 switches the cache off.
        budget: time for the whole run, as in 40m, 2h or 1h30m; null means no limit. The tokens of stages 1 and 2, then
            steps and items per user, then queries are lowered until the estimated time fits.
        cut: the settings that the budget lowered, with their values before; the run writes it.
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


class EvaluationConfig(Section):
    """Methods to compare, seeds, and resamples of the confidence intervals.

    Attributes:
        methods: methods of the table; see `proper evaluate`.
        seeds: a run of all stages for each; results are averaged per user first.
        resamples: bootstrap resamples and permutations of the statistics.
        examples: answers shown in the report.
    """

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


class RetrievalConfig(Section):
    """Items of a user's own earlier history that the methods `rag` and `users+rag` prepend to prompts.

    Attributes:
        kind: how items are found: by words (BM25), by the frozen backbone's hidden states, or by both rankings.
        k: most items of a prompt.
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
    retrieval: RetrievalConfig = RetrievalConfig()
    evaluation: EvaluationConfig = EvaluationConfig()

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
