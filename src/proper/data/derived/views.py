"""Dataset views: the protocol of training data, and wrappers for controls, OPPU's leak and a single user's history."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Protocol

from proper.data.dataset import Dataset, Role, User
from proper.data.sampling import SampledRows, TextExample, Who

EVERYBODY = "\0everybody"
"""Id of the single user of `OneUser`; no id in a file can equal it."""


class Histories(Protocol):
    """Training data of a stage; `Dataset` implements it."""

    def users(self, role: Role | None = None) -> Iterator[User]:
        """Yield users."""

    def history(self, user: str, newest: int | None = None) -> list[TextExample]:
        """List a user's history, oldest first."""

    def sample(self, who: Who, max_tokens: int | None, seed: int) -> SampledRows:
        """Choose history rows to train on."""


@dataclass(frozen=True)
class OneUser:
    """View with the same rows in the same order, all attributed to one user, `EVERYBODY`."""

    dataset: Dataset

    def users(self, role: Role | None = None) -> Iterator[User]:
        """Yield the single user."""
        yield User(EVERYBODY, "target", sum(user.history for user in self.dataset.users(role)), 0)

    def history(self, user: str, newest: int | None = None) -> list[TextExample]:
        """Raise NotImplementedError: the history of the single user would be the whole dataset."""
        raise NotImplementedError("one user for everybody has no history to fit an adapter on")

    def sample(self, who: Who, max_tokens: int | None, seed: int) -> SampledRows:
        """Choose the rows that the data set chooses."""
        return _Renamed(self.dataset.sample(who, max_tokens, seed))


@dataclass(frozen=True)
class _Renamed:
    sample: SampledRows

    @property
    def size(self) -> int:
        return self.sample.size

    @property
    def tokens(self) -> int:
        return self.sample.tokens

    def rows(self, epoch: int) -> Iterator[TextExample]:
        return (replace(row, user=EVERYBODY) for row in self.sample.rows(epoch))


class Leaking:
    """View in which every target user's history includes the histories of all preceding target users.

    This reproduces the leak in OPPU's released training loop, which collects rows in a list created outside the loop
    over users.
    """

    def __init__(self, dataset: Dataset, max_items: int | None) -> None:
        self.dataset, self.max_items = dataset, max_items
        self.order = [user.id for user in dataset.users("target")]

    def users(self, role: Role | None = None) -> Iterator[User]:
        """Yield the dataset's users."""
        return self.dataset.users(role)

    def history(self, user: str, newest: int | None = None) -> list[TextExample]:
        """List the newest `max_items` of every target up to this one, in the order in which they are trained."""
        before = self.order[: self.order.index(user) + 1]
        return [item for each in before for item in self.dataset.history(each, self.max_items)]

    def sample(self, who: Who, max_tokens: int | None, seed: int) -> SampledRows:
        """Choose the rows that the data set chooses."""
        return self.dataset.sample(who, max_tokens, seed)


@dataclass(frozen=True)
class OneHistory:
    """History of one user whose items are not in a dataset."""

    user: str
    items: Sequence[TextExample]

    def users(self, role: Role | None = None) -> Iterator[User]:
        """Yield the user."""
        yield User(self.user, "target", len(self.items), 0)

    def history(self, user: str, newest: int | None = None) -> list[TextExample]:
        """List the items, oldest first; only the `newest` n if given."""
        items = list(self.items) if user == self.user else []
        return items if newest is None else items[-newest:]

    def sample(self, who: Who, max_tokens: int | None, seed: int) -> SampledRows:
        """Raise NotImplementedError: only stages that train on all users sample rows."""
        raise NotImplementedError("one user's history is no sample of everybody's")
