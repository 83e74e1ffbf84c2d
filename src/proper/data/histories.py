"""Types of a stage's training data: users, their interactions, and samples of the histories."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

Role = Literal["target", "other"]
UserSet = Literal["all", "others", "targets"]
SampledBy = Literal["users", "rows"]
CountTokens = Callable[[Sequence[str], Sequence[str]], list[int]]
"""Prompts and targets (B each) to B lengths in tokens, prompt and target together, untruncated."""


@dataclass(frozen=True, slots=True)
class User:
    """One user, with the numbers of history rows and queries."""

    id: str
    role: Role
    history: int
    queries: int


@dataclass(frozen=True, slots=True)
class TextExample:
    """One interaction. `tokens` counts prompt and target in backbone tokens, untruncated; `time` is epoch seconds.

    `task` is the number of its task, from 0.
    """

    id: int
    user: str
    prompt: str
    target: str
    item: str | None
    time: float | None
    tokens: int
    task: int = 0


class SampledRows(Protocol):
    """Rows to train on: `size` rows with `tokens` tokens in all, in a different order in every epoch."""

    @property
    def size(self) -> int: ...  # noqa: D102
    @property
    def tokens(self) -> int: ...  # noqa: D102
    def rows(self, epoch: int) -> Iterator[TextExample]: ...  # noqa: D102


class Histories(Protocol):
    """Training data of a stage: a `dataset.Dataset`, or a view of one (`derived.views`)."""

    def users(self, role: Role | None = None) -> Iterator[User]:
        """Yield users."""

    def history(self, user: str, newest: int | None = None) -> list[TextExample]:
        """List a user's history, oldest first."""

    def sample(self, users: UserSet, max_tokens: int | None, seed: int, by: SampledBy = "users") -> SampledRows:
        """Choose history rows to train on."""
