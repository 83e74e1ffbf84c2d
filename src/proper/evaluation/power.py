"""How small a difference a data set can show, said before anything is trained.

    smallest = (z(.975) + z(.8)) * sqrt(sum_u n_u (1 + (n_u - 1) rho)) * s / N

n_u queries of user u, N in all; s is the spread of one query's paired difference, rho how much the queries of one user
agree (Kish's design effect). Both are assumptions, and are said with the number; after a run, `resolvable` beside
every comparison is measured. Knows nothing about methods.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import pstdev

from proper.data.dataset import Dataset
from proper.evaluation.metrics import TaskKind
from proper.evaluation.statistics import minimal_detectable_difference

DISAGREEMENT = 0.25
"""Assumed share of queries on which two methods differ in being right; HuffPost's and the demo's steps are near it."""

RATING_SHARE = 0.5
"""Assumed spread of paired differences of absolute errors, as a share of the ratings' spread; .4 to .5 on MovieLens."""

CORRELATION = 0.1
"""Assumed correlation of the paired differences of one user's queries."""


@dataclass(frozen=True)
class Power:
    """The smallest difference that shows with 80 % power at 5 %, in the main metric, and what that assumes."""

    metric: str
    smallest: float
    assumes: str
    users: int
    queries: int

    def line(self) -> str:
        """Put it into one line for a terminal."""
        size = f"a difference of {self.smallest:.3f} in {self.metric}"
        whom = f"{self.queries:,} queries of {self.users:,} users"
        return f"{'power':<10}{size} shows with {whom} (80 %, p < .05), if {self.assumes}"


def expected_power(dataset: Dataset, kind: TaskKind) -> Power | None:
    """Return what this data set can resolve; None for free text, where no assumption holds for all."""
    counts = [user.queries for user in dataset.users("target") if user.queries]
    if kind == "generation" or not counts:
        return None
    agree = f"one user's queries agree with r = {CORRELATION}"
    if kind == "classification":
        spread, assumes = math.sqrt(DISAGREEMENT), f"methods differ on {DISAGREEMENT:.0%} of the queries and {agree}"
        metric = "accuracy"
    else:
        spread = RATING_SHARE * pstdev(float(query.target) for query in dataset.queries())
        assumes, metric = f"errors differ by {RATING_SHARE} of the ratings' spread and {agree}", "MAE"
    smallest = smallest_difference(counts, spread)
    return Power(metric, smallest, assumes, len(counts), sum(counts))


def smallest_difference(queries: Sequence[int], spread: float, correlation: float = CORRELATION) -> float:
    """Return the smallest difference for users with so many queries each; see the module's formula."""
    total = sum(queries)
    variance = spread**2 * sum(n * (1 + (n - 1) * correlation) for n in queries) / total**2
    users = len(queries)
    return minimal_detectable_difference(math.sqrt(variance * users), users)
