"""Views of a prepared dataset, with the interface of training data (`histories.Histories`).

All rows as one user's, OPPU's leak, and the history of one user outside of the dataset.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from proper.data.dataset import Dataset
from proper.data.histories import Role, SampledBy, SampledRows, TextExample, User, UserSet

SINGLE_USER = "\0all users"
"""Id of the single user of `OneUser`; no id in a file can equal it."""


@dataclass(frozen=True)
class OneUser:
    """View with the same rows in the same order, all attributed to one user, `SINGLE_USER`."""

    dataset: Dataset

    def users(self, role: Role | None = None) -> Iterator[User]:
        """Yield the single user."""
        yield User(SINGLE_USER, "target", sum(user.history for user in self.dataset.users(role)), 0)

    def history(self, user: str, newest: int | None = None) -> list[TextExample]:
        """Raise NotImplementedError: the history of the single user would be the whole dataset."""
        raise NotImplementedError("the single user of this view has no history to fit an adapter on")

    def sample(self, users: UserSet, max_tokens: int | None, seed: int, by: SampledBy = "users") -> SampledRows:
        """Sample the same rows as the dataset."""
        return _Renamed(self.dataset.sample(users, max_tokens, seed, by))


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
        return (replace(row, user=SINGLE_USER) for row in self.sample.rows(epoch))


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

    def sample(self, users: UserSet, max_tokens: int | None, seed: int, by: SampledBy = "users") -> SampledRows:
        """Sample the same rows as the dataset."""
        return self.dataset.sample(users, max_tokens, seed, by)


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

    def sample(self, users: UserSet, max_tokens: int | None, seed: int, by: SampledBy = "users") -> SampledRows:
        """Raise NotImplementedError: only stages that train on all users sample rows."""
        raise NotImplementedError(
            "the history of one user cannot be sampled; only stages that train on all users sample rows"
        )
