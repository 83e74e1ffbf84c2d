"""Bootstrap intervals and permutation tests with the user, not the query, as the unit.

One estimator is used everywhere. `value` is the metric over all queries pooled; with several seeds it is computed for
each and averaged. A *difference* is value minus value. Its interval resamples users, whose queries are pooled, and
seeds, the same ones for both methods. Its p-value comes from swapping the two methods' answers user by user and
recomputing the same difference. So `difference`, `ci95` and `p_value` refer to one number, also for F1 and RMSE, which
have no value per query. For a metric that is a mean, the swap is the sign-flip test on each user's summed difference,
averaged over seeds. (`value_users`, in which every user has equal weight, is also reported and is not tested.) Queries
of one user are not independent, so they are resampled and swapped together. The intervals are percentile intervals: for
F1, which is biased down in resamples that lose a label, they can be slightly low.

Shapes: S seeds, U users, F contributions of the metric, N resamples or draws.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from statistics import NormalDist

import numpy as np

from proper.errors import DataError
from proper.evaluation.metrics import FloatArray, Metric, Prediction, TaskInfo, get_metric
from proper.evaluation.resampling import all_swaps, random_swaps, resampled, user_resamples

_LARGEST_EXACT = 13  # 2 ** 13 = 8,192 swaps, fewer than the default number of random draws


@dataclass(frozen=True)
class Effort:
    """Number of bootstrap resamples and of permutation draws, and the seed of both."""

    resamples: int = 2000
    draws: int = 10_000
    seed: int = 0


DEFAULT_EFFORT = Effort()
"""The effort of every comparison that does not name another."""


@dataclass(frozen=True, slots=True)
class UserScores:
    """One method on one metric: sums over each user's queries, `sums (S, U, F)`, and `counts (U,)` of queries."""

    metric: Metric
    users: tuple[str, ...]
    sums: FloatArray
    counts: FloatArray

    def values(self) -> FloatArray:
        """The metric over all queries in each seed, `(S,)`."""
        return self.metric.finish(self.sums.sum(axis=1), self.counts.sum())

    def user_values(self) -> FloatArray:
        """The metric on each user's own queries, averaged over seeds, `(U,)`."""
        return np.asarray(self.metric.finish_user(self.sums, self.counts).mean(axis=0))

    def only(self, users: Collection[str]) -> UserScores:
        """Return the scores restricted to some of the users."""
        keep = np.asarray([user in users for user in self.users], dtype=np.bool_)
        kept = tuple(user for user in self.users if user in users)
        return replace(self, users=kept, sums=self.sums[:, keep], counts=self.counts[keep])


@dataclass(frozen=True, slots=True)
class Estimate:
    """A value, the mean over users of their own values, and a 95 % interval of the value (NaN below two users)."""

    value: float
    value_users: float
    low: float
    high: float


@dataclass(frozen=True, slots=True)
class Comparison:
    """Method minus against: difference, `relative` (positive is better), interval, two-sided p, `resolvable`.

    `resolvable` is the minimal detectable difference with these users at 80 % power.
    """

    difference: float
    relative: float
    low: float
    high: float
    p_value: float
    test: str
    resolvable: float


def user_scores(name: str, seeds: Sequence[Sequence[Prediction]], task: TaskInfo) -> UserScores:
    """Sum a metric's contributions by user; one sequence of predictions per seed, all on the same queries.

    The result is bitwise independent of the order of the predictions.

    Raises:
        DataError: there are no predictions, a gold is unusable, or seeds differ in their queries.
    """
    metric = get_metric(name)
    if not seeds or not seeds[0]:
        raise DataError(f"metric {name}: no predictions to score")
    ordered = [sorted(rows, key=lambda row: (row.user, row.id)) for rows in seeds]
    queries = [(row.user, row.id) for row in ordered[0]]
    users = tuple(sorted({user for user, _ in queries}))
    indices = {user: index for index, user in enumerate(users)}
    owner = np.asarray([indices[user] for user, _ in queries])
    sums = []
    for rows in ordered:
        if [(row.user, row.id) for row in rows] != queries:
            raise DataError(f"metric {name}: seeds answer different queries")
        contributions = metric.contributions(rows, task)
        starts = np.searchsorted(owner, np.arange(len(users)))
        sums.append(np.add.reduceat(contributions, starts, axis=0))
    counts = np.bincount(owner, minlength=len(users)).astype(np.float64)
    return UserScores(metric, users, np.stack(sums), counts)


def bootstrap(scores: Sequence[UserScores], effort: Effort = DEFAULT_EFFORT) -> FloatArray:
    """Recompute several scores on the same N resamples of their common users and seeds; returns `(len(scores), N)`.

    Raises:
        DataError: the scores are not of the same users and queries.
    """
    for other in scores[1:]:
        _require_paired(scores[0], other)
    count = len(scores[0].users)
    widest = max(one.sums.shape[0] * one.sums.shape[2] for one in scores)
    # A generator each, so that the draws do not depend on the size of the pieces.
    of_seeds = np.random.default_rng([effort.seed, 1])
    pieces = []
    for users in user_resamples(count, effort.resamples, effort.seed, count + widest):
        seeds = resampled(of_seeds, scores[0].sums.shape[0], len(users))
        pieces.append(np.stack([_weighted(one, users, seeds) for one in scores]))
    return np.concatenate(pieces, axis=1)


def estimate(scores: UserScores, effort: Effort = DEFAULT_EFFORT) -> Estimate:
    """Return the value over queries with its 95 % bootstrap interval over users and seeds."""
    low, high = _interval(scores, bootstrap([scores], effort)[0])
    return Estimate(float(scores.values().mean()), float(scores.user_values().mean()), low, high)


def compare(method: UserScores, against: UserScores, effort: Effort = DEFAULT_EFFORT) -> Comparison:
    """Compare two methods on the same queries, paired by user.

    Raises:
        DataError: the scores are not of the same users and queries.
    """
    _require_paired(method, against)
    ours, theirs = float(method.values().mean()), float(against.values().mean())
    difference = ours - theirs
    sign = 1.0 if method.metric.higher_is_better else -1.0
    ours_again, theirs_again = bootstrap([method, against], effort)
    differences = ours_again - theirs_again
    low, high = _interval(method, differences)
    p_value, test = permutation_test(method, against, effort)
    users = len(method.users)
    # The standard deviation over resamples is sd / sqrt(users) for any metric, so it yields sd of users' differences
    # (with several seeds, including what they add).
    sd = float(differences.std()) * math.sqrt(users) if users > 1 else math.nan
    relative = sign * difference / abs(theirs) if theirs else math.nan
    return Comparison(difference, relative, low, high, p_value, test, minimal_detectable_difference(sd, users))


def standings(scores: Sequence[UserScores], effort: Effort = DEFAULT_EFFORT) -> list[str]:
    """Return "best" for the best method, "tied" if the 95 % interval of the difference to it contains 0, else "".

    Resamples are paired by user. A tie means that these users cannot distinguish the method from the best; it is not a
    test.

    Raises:
        DataError: the scores are not of the same users and queries.
    """
    sign = 1.0 if scores[0].metric.higher_is_better else -1.0
    values = [sign * float(one.values().mean()) for one in scores]
    top = max(range(len(values)), key=values.__getitem__)
    again = sign * bootstrap(scores, effort)
    found = []
    for index, value in enumerate(values):
        _, high = _interval(scores[index], again[index] - again[top])
        tied = value == values[top] or not high < 0
        found.append("best" if index == top else "tied" if tied else "")
    return found


def permutation_test(method: UserScores, against: UserScores, effort: Effort = DEFAULT_EFFORT) -> tuple[float, str]:
    """Return the two-sided p-value of the difference under swapping methods user by user, and the test's name.

    With at most 13 users whose answers differ, all swaps are enumerated; otherwise some are drawn at random, with
    p = (1 + b) / (1 + draws) for b swaps at least as extreme (Phipson and Smyth, 2010), which is never 0.

    Raises:
        DataError: the scores are not of the same users and queries.
    """
    _require_paired(method, against)
    gap = against.sums - method.sums
    # Swapping a user with equal scores under both methods changes nothing, so the exact test omits such users.
    gap = gap[:, gap.any(axis=(0, 2))]
    users = gap.shape[1]
    ours, theirs, total = method.sums.sum(axis=1), against.sums.sum(axis=1), method.counts.sum()
    finish = method.metric.finish

    def statistic(swaps: FloatArray) -> FloatArray:
        moved = swaps @ gap
        return np.asarray((finish(ours[:, None] + moved, total) - finish(theirs[:, None] - moved, total)).mean(axis=0))

    observed = abs(float(statistic(np.zeros((1, users)))[0]))
    # Equal differences can deviate by a rounding error, and a tie must count as extreme.
    bar = observed * (1 - 1e-9) - 1e-12
    exact = users <= _LARGEST_EXACT
    count = 2**users if exact else effort.draws
    width = gap.shape[0] * gap.shape[2]
    swaps = all_swaps(users) if exact else random_swaps(users, effort.draws, effort.seed, width)
    extreme = sum(int((np.abs(statistic(piece)) >= bar).sum()) for piece in swaps)
    if exact:
        return extreme / count, "paired permutation over users, exact"
    return (1 + extreme) / (1 + count), f"paired permutation over users, {count} draws"


def holm(p_values: Sequence[float]) -> list[float]:
    """Return Holm's (1979) adjusted p-values of one family, in the given order."""
    adjusted = [0.0] * len(p_values)
    so_far = 0.0
    for rank, index in enumerate(sorted(range(len(p_values)), key=lambda index: p_values[index])):
        so_far = max(so_far, min(1.0, (len(p_values) - rank) * p_values[index]))
        adjusted[index] = so_far
    return adjusted


def smallest_p(users: int) -> float:
    """Return the smallest p-value that the exact permutation test has for so many users."""
    return 2.0 ** (1 - users)


def minimal_detectable_difference(sd: float, users: int, power: float = 0.8, level: float = 0.05) -> float:
    """Return the smallest true difference that a two-sided test at `level` finds with probability `power`.

    Normal approximation: `(z(1 - level / 2) + z(power)) * sd / sqrt(users)`, with `sd` the standard deviation over
    users of the paired difference. NaN where users differ but are too few for any p-value below `level`.

    Raises:
        DataError: there are no users.
    """
    if users < 1:
        raise DataError("the smallest detectable difference needs at least one user")
    if sd and smallest_p(users) >= level:
        return math.nan
    normal = NormalDist()
    return (normal.inv_cdf(1 - level / 2) + normal.inv_cdf(power)) * sd / math.sqrt(users)


def _require_paired(one: UserScores, other: UserScores) -> None:
    if one.metric.name != other.metric.name:
        raise DataError(f"metric {one.metric.name} cannot be compared with {other.metric.name}")
    if one.users != other.users or not np.array_equal(one.counts, other.counts) or one.sums.shape != other.sums.shape:
        raise DataError(f"metric {one.metric.name}: the methods did not answer the same queries of the same users")


def _weighted(scores: UserScores, users: FloatArray, seeds: FloatArray) -> FloatArray:
    """Return the value for each row of user weights `(N, U)` and of seed weights `(N, S)`, averaged over seeds."""
    by_seed = scores.metric.finish(users @ scores.sums, users @ scores.counts)
    return np.asarray((by_seed * seeds.T).sum(axis=0) / seeds.sum(axis=1))


def _interval(scores: UserScores, values: FloatArray) -> tuple[float, float]:
    if len(scores.users) < 2:  # one user allows no inference about others; an interval of width 0 would suggest it
        return math.nan, math.nan
    low, high = np.quantile(values, [0.025, 0.975])
    return float(low), float(high)
