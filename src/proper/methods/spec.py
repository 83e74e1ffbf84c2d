"""Method specification: the trained stages that a method needs, and how it answers from them.

A `DerivedRun` describes a variant of the run in a folder of its own: other settings, other data or another trainer,
with earlier stages taken over from the run.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from proper.config import Config, TaskConfig
from proper.data.dataset import Dataset
from proper.evaluation.runner import MethodRun
from proper.run_folder import Stage
from proper.training.metrics_log import Log

PerUser = Literal["nothing", "history", "embedding", "adapter", "export", "int8"]
"""Data that must be kept per user for a method to answer."""

Needs = Literal["nothing", "labels", "text"]
"""What a method needs of the task: labels or ratings, or free text."""


@dataclass(frozen=True)
class TrainedRun:
    """A trained folder of one seed, and the dataset whose queries it answers."""

    config: Config
    dataset: Dataset
    folder: Path
    seed: int


@dataclass(frozen=True)
class TrainingWork:
    """Arguments of a variant's training: its `run` and the `stages` to train, in order; earlier stages exist."""

    run: TrainedRun
    stages: Sequence[Stage]
    log: Log


Derive = Callable[[Dataset, Path, Config, int], None]
"""Function that writes a derived dataset to a path: `derive(dataset, path, config, seed)`."""


@dataclass(frozen=True)
class DerivedRun:
    """A variant of the run.

    Attributes:
        name: name of its folder, followed by a hash of all its inputs.
        train: the training function.
        inherits: stages taken over from the run; the method's other stages are trained.
        settings: config settings that differ, by section.
        derive: function that derives its data from the run's; None for the same data.
        seeded: whether the derived data depends on the seed.
        derived_by: what tells derived data of runs of one name apart.
    """

    name: str
    train: Callable[[TrainingWork], None]
    inherits: tuple[Stage, ...] = ()
    settings: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    derive: Derive | None = None
    seeded: bool = False
    derived_by: str = ""


@dataclass(frozen=True)
class Method:
    """A method, that is, one row of the results table.

    Attributes:
        answer: function from a trained folder to the predictions for all queries of its data.
        stages: required stages, in order; empty for a method without a trained model.
        variant: the variant in which they are trained; None for the run itself.
        keeps: data that must be kept per user.
        needs: what the task must have: labels or ratings, or free text.
        on_all_tasks: whether it can answer the tasks of a run of several.
        targets: smallest number of target users (0: any); controls that exchange users need two.
        pools_users: whether its training takes all rows as one user's.
    """

    name: str
    answer: Callable[[TrainedRun], MethodRun]
    stages: tuple[Stage, ...] = ()
    variant: DerivedRun | None = None
    keeps: PerUser = "nothing"
    needs: Needs = "nothing"
    on_all_tasks: bool = False
    targets: int = 0
    pools_users: bool = False

    def obstacle_in(self, config: Config) -> str | None:
        """Return why the method cannot answer any task of a config; None if it can.

        With several tasks, every task is answered apart, so a method must not train or choose anything on one task's
        data: it answers from the run's own stages, or from stages trained on the rows of all tasks.
        """
        if config.tasks and not self.on_all_tasks:
            return f"'{self.name}' needs a run of one task"
        if config.privacy.on and self.pools_users:
            return f"'{self.name}' trains on all rows as one user's, whom privacy would clip as one; leave it out"
        found = [self.obstacle(one.task) for one in config.each_task.values()]
        return None if None in found else found[0]

    def obstacle(self, task: TaskConfig) -> str | None:
        """Return why the method cannot answer this task; None if it can."""
        has_labels = task.kind != "generation"
        if self.needs == "labels" and not has_labels:
            return f"'{self.name}' needs labels or ratings, and task.kind is generation"
        if self.needs == "text" and has_labels:
            return f"'{self.name}' answers with words of the input, and task.kind is {task.kind}"
        return None
