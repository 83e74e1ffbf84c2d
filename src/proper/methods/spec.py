"""What a method is: which trained folder it needs, and how it answers from it.

A `DerivedRun` is a run folder beside the run's own: other settings, other data or another way of training, with the
run's earlier stages taken over. Knows no method by name.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from proper.config import Config
from proper.data.dataset import Dataset
from proper.evaluation.runner import MethodRun
from proper.training.trainer import Log

Trained = Literal["population", "groups", "users"]
"""A stage's folder in a run folder."""

PerUser = Literal["nothing", "history", "embedding", "adapter", "export", "int8"]
"""What must be kept for a user so that a method can answer them."""


@dataclass(frozen=True)
class TrainedRun:
    """A trained folder of one seed, and the data whose queries are answered from it."""

    config: Config
    dataset: Dataset
    folder: Path
    seed: int


@dataclass(frozen=True)
class TrainingWork:
    """What a variant's training is given: where to leave `stages`, in their order; earlier ones are there."""

    place: TrainedRun
    stages: Sequence[Trained]
    log: Log


Derive = Callable[[Dataset, Path, Config, int], None]
"""Write another data set, made from one, to a path: `derive(dataset, path, config, seed)`."""


@dataclass(frozen=True)
class DerivedRun:
    """A run that differs from the run in hand.

    Attributes:
        name: of its folder; together with everything that it is made of, a hash follows.
        train: how.
        inherits: the stages that are the run's own; the method's others are trained anew.
        settings: what its config has otherwise, section by section.
        derive: how its data is made from the run's; None for the same data.
        seeded: whether that data is another one for every seed.
    """

    name: str
    train: Callable[[TrainingWork], None]
    inherits: tuple[Trained, ...] = ()
    settings: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    derive: Derive | None = None
    seeded: bool = False


@dataclass(frozen=True)
class Method:
    """One row of the table.

    Attributes:
        answer: from a trained folder, the predictions for all queries of its data.
        stages: the stages that must be there, in their order; none for a method without a trained model.
        variant: where they are trained; None for the run itself.
        keeps: what has to be kept for every user.
    """

    name: str
    answer: Callable[[TrainedRun], MethodRun]
    stages: tuple[Trained, ...] = ()
    variant: DerivedRun | None = None
    keeps: PerUser = "nothing"
