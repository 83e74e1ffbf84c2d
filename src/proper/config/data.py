"""Settings of the data (columns, templates) and of the task (kind of answer, labels, decoding)."""

from __future__ import annotations

from typing import Annotated, Literal, get_args

from pydantic import Field, field_validator, model_validator

from proper.config.lamp_tasks import GIVEN_FORMATS, LampName, Layout, lamp_name
from proper.config.section import Count, Positive, Section


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
        item: column of the item that a row refers to; null if there is none.
        prompt: template of the prompt; `{column}` is replaced by the row's value. `{item_mean}` (ratings),
            `{item_usual}` (labels) and `{item_count}` are computed from other users' histories of the row's item.
        target: template of the answer.
        rows: content of a row: the templates' columns; `messages`, a list of objects with role and content, of which
            the last assistant's is the answer; or `completion`, TRL's columns prompt and completion, as texts or lists
            of messages. `auto` takes the conversation if no template is given and the default templates' columns
            are missing.
        train_without: file of user ids, one per line; their rows are left out when a run reads its data, so that no
            stage, method or evaluation uses them. Relative to the current folder, else to the config's folder.
        assistant_loss: whether training counts the last assistant's message of a conversation, or all of them.
        task_column: column that names the task of a row, for files with rows of several `tasks`; each task reads its
            own rows.
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
    task_column: str | None = None

    @property
    def given_split(self) -> bool:
        """Whether the data files define which rows are queries."""
        return self.format in GIVEN_FORMATS

    @field_validator("path", "train_without")
    @classmethod
    def _names_a_file(cls, path: str | None) -> str | None:
        if path is not None and not path.strip():
            raise ValueError("empty")  # as a path, it would be the current folder
        return path

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
        if self.layout != "official" and not self.given_split:
            raise ValueError(f"layout: '{self.layout}' goes with format: lamp or oppu, not '{self.format}'")
        return self


class TaskConfig(Section):
    """Kind of task, labels and decoding.

    Attributes:
        kind: kind of the answers: labels, numbers or free text.
        labels: the labels, of which every answer is one; `auto` takes those of the training rows.
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

    @field_validator("labels", mode="before")
    @classmethod
    def _quoted(cls, labels: object) -> object:
        for label in labels if isinstance(labels, list | tuple) else ():
            if not isinstance(label, str):
                raise ValueError(
                    f"label {label!r} is not text: YAML reads no, 1 or 2024-01-01 as another value; write it in quotes"
                )
        return labels

    @model_validator(mode="after")
    def _labels_go_with_kind(self) -> TaskConfig:
        if self.labels != "auto" and self.kind == "generation":
            raise ValueError("labels: go with kind: classification or rating, not with generation")
        return self

    @model_validator(mode="after")
    def _score_needs_labels(self) -> TaskConfig:
        if self.kind == "generation" and self.decode == "score":
            raise ValueError("decode: 'score' needs labels, and a generation task has none")
        return self


class TaskSpec(Section):
    """One of several tasks of a run: its data and its kind.

    Attributes:
        data: the task's rows and templates; other tasks may read the same file.
        task: kind of task, labels and decoding.
        weight: weight of an answer in training, relative to an answer of another task, independent of its length.
    """

    data: DataConfig
    task: TaskConfig = TaskConfig()
    weight: Positive = 1.0
