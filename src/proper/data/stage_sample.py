"""The rows that stages 1 and 2 train on: the users, the token budget and the order that the stage's settings give."""

from __future__ import annotations

from typing import Literal, Protocol, TypeVar

from proper.config import Config
from proper.data.histories import SampledBy, SampledRows, UserSet
from proper.errors import DataError

SharedStage = Literal["population", "groups"]
"""A stage whose parameters all users share."""

SHARED_STAGES: tuple[SharedStage, ...] = ("population", "groups")

Rows = TypeVar("Rows", bound=SampledRows, covariant=True)


class Samples(Protocol[Rows]):
    """Data that rows can be sampled from: a `Dataset`, or a view of one."""

    def sample(self, users: UserSet, max_tokens: int | None, seed: int, by: SampledBy) -> Rows:
        """Choose history rows to train on."""


def stage_sample(dataset: Samples[Rows], stage: SharedStage, config: Config, seed: int) -> Rows:
    """Return the history rows that a stage trains on.

    Raises:
        DataError: no user has rows to train on.
    """
    own = config.population if stage == "population" else config.groups
    by = config.population.sampling if stage == "population" else "users"
    sample = dataset.sample(own.train_on, own.max_tokens, seed, by)
    if not sample.size:
        how = "; set it to all, or lower split.target_users" if own.train_on == "others" else ""
        raise DataError(
            f"{stage}.train_on: '{own.train_on}' selects no rows to train on, because no such user has any{how}"
        )
    return sample
