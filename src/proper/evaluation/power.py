"""Power analysis before training: the minimal detectable difference of a dataset.

    smallest = (z(.975) + z(.8)) * sqrt(sum_u n_u (1 + (n_u - 1) rho)) * s / N

n_u is the number of queries of user u, N their total, s the standard deviation of one query's paired difference, rho
the correlation within a user (Kish's design effect). s and rho are assumptions and are reported with the number; after
a run, `resolvable` of every comparison is measured.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import count
from statistics import pstdev

from proper.data.dataset import Dataset
from proper.evaluation.metrics import TaskKind
from proper.evaluation.statistics import minimal_detectable_difference, smallest_p

DISAGREEMENT = 0.25
"""Assumed share of queries that exactly one of two methods answers correctly; HuffPost and the demo are near it."""

RATING_SHARE = 0.5
"""Assumed standard deviation of paired absolute-error differences over that of the ratings; .4 to .5 on MovieLens."""

CORRELATION = 0.1
"""Assumed correlation of the paired differences of one user's queries."""

LEAST_USERS = next(users for users in count(1) if smallest_p(users) < 0.05)
"""Fewest users with whom a difference can be significant."""


@dataclass(frozen=True)
class Power:
    """The minimal detectable difference in the main metric (80 % power at 5 %), with its assumptions.

    It is NaN where the users are too few for any test.
    """

    metric: str
    smallest: float
    assumes: str
    users: int
    queries: int

    def line(self) -> str:
        """Return one line for a terminal."""
        size = f"a difference of {self.smallest:.3f} in {self.metric}"
        whom = f"{self.queries:,} queries of {self.users:,} users"
        if math.isnan(self.smallest):
            return (
                f"{'power':<10}{whom} cannot show any difference: users are the unit of the test, and p < .05 needs "
                f"{LEAST_USERS} target users or more"
            )
        return f"{'power':<10}{whom} can show {size} (p < .05 in 80 % of runs), if {self.assumes}"


def expected_power(dataset: Dataset, kind: TaskKind) -> Power | None:
    """Return the minimal detectable difference of a dataset; None for generation, where no assumption fits all data."""
    counts = [user.queries for user in dataset.users("target") if user.queries]
    if kind == "generation" or not counts:
        return None
    agree = f"the differences of one user's queries correlate with r = {CORRELATION}"
    if kind == "classification":
        spread, assumes = math.sqrt(DISAGREEMENT), f"methods differ on {DISAGREEMENT:.0%} of the queries and {agree}"
        metric = "accuracy"
    else:
        spread = RATING_SHARE * pstdev(float(query.target) for query in dataset.queries())
        assumes, metric = f"errors differ by {RATING_SHARE} of the ratings' spread and {agree}", "MAE"
    smallest = smallest_difference(counts, spread)
    return Power(metric, smallest, assumes, len(counts), sum(counts))


def smallest_difference(queries: Sequence[int], spread: float, correlation: float = CORRELATION) -> float:
    """Return the minimal detectable difference for users with these numbers of queries; see the module's formula."""
    total = sum(queries)
    variance = spread**2 * sum(n * (1 + (n - 1) * correlation) for n in queries) / total**2
    users = len(queries)
    return minimal_detectable_difference(math.sqrt(variance * users), users)
