"""Builds one user's history: the items of the run's data and the interactions logged since, oldest first.

`divide` separates the interactions that are new to a version, and `hold_out` those on which an update is compared.
"""

from __future__ import annotations

import math
import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from proper.adapters.store import DEFAULT_TENANT
from proper.data.dataset import Dataset
from proper.data.histories import TextExample
from proper.data.values import find_label
from proper.files import hash_value
from proper.interactions.log import InteractionLog, LoggedInteraction
from proper.run_folder import RunFolder
from proper.training.checkpoint import seed_of
from proper.training.jobs import held_out_items


@dataclass(frozen=True)
class UserHistory:
    """All items of one user, oldest first.

    Attributes:
        run: number of items in the run's own data; None if that data is not available.
        logged: number of items from the interaction log.
    """

    items: tuple[TextExample, ...]
    run: int | None
    logged: int

    @property
    def digest(self) -> str:
        """Hash of the items."""
        return hash_value([[each.prompt, each.target, each.time] for each in self.items])

    @property
    def ordinals(self) -> dict[int, int]:
        """The place of each logged interaction, by item id, among those of the user in the order of arrival, from 1."""
        arrived = sorted((item.id for item in self.items if item.id < 0), reverse=True)
        return {number: at for at, number in enumerate(arrived, start=1)}


@dataclass(frozen=True)
class Divided:
    """A user's interactions, oldest first: `past` ones, known to the version in service, and `new` ones.

    `left_out` are the ordinals of logged interactions that were outliers in earlier updates; they are in neither, nor
    are interactions before number `since`, at which the user's habits changed (0: no change).
    """

    past: tuple[TextExample, ...]
    new: tuple[TextExample, ...]
    left_out: tuple[int, ...] = ()
    since: int = 0


@dataclass(frozen=True)
class Split:
    """Which interactions an update trains on, and which it is compared on."""

    past: tuple[TextExample, ...]
    new: tuple[TextExample, ...]
    held_past: tuple[TextExample, ...]
    held_new: tuple[TextExample, ...]


@dataclass(frozen=True)
class Rows:
    """Training rows of several users in memory, as `SampledRows`."""

    examples: Sequence[TextExample]
    seed: int

    @property
    def size(self) -> int:
        """Number of rows."""
        return len(self.examples)

    @property
    def tokens(self) -> int:
        """Tokens of the rows from the run's data, untruncated; those of logged interactions are not counted."""
        return sum(each.tokens for each in self.examples)

    def rows(self, epoch: int) -> Iterator[TextExample]:
        """Yield every row once, in an order that depends on the seed and `epoch`."""
        order = list(self.examples)
        random.Random(seed_of(self.seed, "rows", epoch)).shuffle(order)
        return iter(order)


def grown_history(dataset: Dataset | None, log: InteractionLog, tenant: str, user: str, kind: str) -> UserHistory:
    """Merge the run's data and the interaction log into a user's history.

    The run's data belongs to the default tenant. A logged interaction without a time takes its time of arrival; an item
    of the run's data without a time comes before all others. A label that the run's data spells differently (3 for 3.0,
    by the task's `kind`) takes the run's spelling. The tokens of logged interactions are not counted: theirs are 0.
    """
    labels = dataset.labels if dataset is not None else []
    logged = [
        replace(each, target=find_label(each.target, labels, kind) or each.target)
        for each in log.interactions(tenant, user)
    ]
    before: list[TextExample] | None = []
    if tenant == DEFAULT_TENANT:
        before = dataset.history(user) if dataset is not None else None
    keyed = [(-math.inf if each.time is None else each.time, each) for each in before or ()]
    keyed += [(each.received if each.time is None else each.time, _example(user, each)) for each in logged]
    ordered = tuple(example for _, example in sorted(keyed, key=lambda pair: pair[0]))
    return UserHistory(ordered, None if before is None else len(before), len(logged))


def divide(grown: UserHistory, metadata: Mapping[str, Any]) -> Divided:
    """Divide a history into items that a version was trained on, by its metadata, and new ones.

    That is the first `history.logged` interactions in the order of arrival, without those in `history.left_out` or
    before `history.since`, and the items of the run's data, which are never new.
    """
    history, ordinals = metadata.get("history", {}), grown.ordinals
    logged, left_out = int(history.get("logged", 0)), tuple(history.get("left_out", ()))
    since = int(history.get("since", 0))
    items = [item for item in grown.items if (at := ordinals.get(item.id, 0)) >= since and at not in left_out]
    new = sorted((item for item in items if ordinals.get(item.id, 0) > logged), key=lambda item: -item.id)
    past = tuple(item for item in items if ordinals.get(item.id, 0) <= logged)
    return Divided(past, tuple(new), left_out, since)


def hold_out(divided: Divided, share: float, *, anew: bool = False) -> Split:
    """Hold out a share of the new interactions, the newest, and as many of the newest earlier ones.

    For a fit `anew`, at least the share of the earlier ones is held out: they decide whether an adapter helps, too.
    """
    held_new = held_out_items(len(divided.new), share)
    wanted = max(held_new, held_out_items(len(divided.past), share)) if anew else held_new
    held_past = min(wanted, max(0, len(divided.past) - 1))
    cut_new, cut_past = len(divided.new) - held_new, len(divided.past) - held_past
    return Split(divided.past[:cut_past], divided.new[:cut_new], divided.past[cut_past:], divided.new[cut_new:])


def run_data(folder: Path) -> Dataset | None:
    """Open the run's prepared data, which further seeds share; None if it no longer exists."""
    path = RunFolder(folder).home.data
    return Dataset.open(path) if path.is_file() else None


def _example(user: str, logged: LoggedInteraction) -> TextExample:
    return TextExample(-logged.number, user, logged.prompt, logged.target, None, logged.time, 0)
