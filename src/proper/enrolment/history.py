"""One user's history as it has grown: what the run was trained on, then what was logged since.

Knows nothing about models but how long a text is in tokens.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from proper.adapters.store import DEFAULT_TENANT
from proper.data.dataset import Dataset
from proper.data.labels import find_label
from proper.data.sampling import TextExample
from proper.files import hash_value
from proper.interactions.log import InteractionLog, LoggedInteraction
from proper.run_files import run_home


@dataclass(frozen=True)
class UserHistory:
    """All that is known of one user, oldest first.

    Attributes:
        run: how many items the run's own data has; None where that is not at hand.
        logged: how many came since.
    """

    items: tuple[TextExample, ...]
    run: int | None
    logged: int

    @property
    def digest(self) -> str:
        """Stands for the items."""
        return hash_value([[each.prompt, each.target, each.time] for each in self.items])


Count = Callable[[Sequence[str], Sequence[str]], list[int]]


def grown_history(
    dataset: Dataset | None, log: InteractionLog, tenant: str, user: str, count: Count, kind: str
) -> UserHistory:
    """Gather a user's history.

    The run's data belongs to the default tenant. An interaction without a time counts as of when it was logged, one of
    the run's data as before all others. A label that the run's data spells otherwise (3 for 3.0, by the task's
    `kind`) is spelled as there.
    """
    labels = dataset.labels if dataset is not None else []
    logged = [
        replace(each, target=find_label(each.target, labels, kind) or each.target)
        for each in log.interactions(tenant, user)
    ]
    before: list[TextExample] | None = []
    if tenant == DEFAULT_TENANT:
        before = dataset.history(user) if dataset is not None else None
    tokens = count([each.prompt for each in logged], [each.target for each in logged])
    since = [_example(user, each, length) for each, length in zip(logged, tokens, strict=True)]
    keyed = [(-math.inf if each.time is None else each.time, each) for each in before or ()]
    keyed += [
        (each.received if each.time is None else each.time, mine) for each, mine in zip(logged, since, strict=True)
    ]
    ordered = tuple(example for _, example in sorted(keyed, key=lambda pair: pair[0]))
    return UserHistory(ordered, None if before is None else len(before), len(logged))


def run_data(folder: Path) -> Dataset | None:
    """Open the run's prepared data, which further seeds share; None where it is gone."""
    path = run_home(folder) / "data.sqlite"
    return Dataset.open(path) if path.is_file() else None


def _example(user: str, logged: LoggedInteraction, tokens: int) -> TextExample:
    return TextExample(-logged.number, user, logged.prompt, logged.target, None, logged.time, tokens)
