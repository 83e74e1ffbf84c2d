"""Every vectorized statistic against a slow, obvious one; intervals and tests against what they promise."""

from __future__ import annotations

import itertools
import math
import random
import time
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from proper.errors import DataError
from proper.evaluation.metrics import METRICS, Prediction, TaskInfo, get_metric, score
from proper.evaluation.statistics import (
    Effort,
    UserScores,
    bootstrap,
    compare,
    estimate,
    holm,
    minimal_detectable_difference,
    permutation_test,
    standings,
    user_scores,
)

LABELS = TaskInfo("labels", "classification", ("a", "b", "c"))
STARS = TaskInfo("stars", "rating", ("1", "2", "3", "4", "5"))
TASKS = {"accuracy": LABELS, "f1_macro": LABELS, "mae": STARS, "rmse": STARS}


def invent(seed: int, users: int, task: TaskInfo, right: float = 0.5) -> list[Prediction]:
    """Invent predictions: one to five queries a user, targets the same for every `right`."""
    random_ = random.Random(seed)
    rows = []
    for user in range(users):
        for _ in range(random_.randint(1, 5)):
            target, other, draw = random_.choice(task.labels), random_.choice(task.labels), random_.random()
            prediction = target if draw < right else other
            rows.append(Prediction(id=len(rows), user=f"u{user}", prompt="", target=target, prediction=prediction))
    return rows


def seeds_of(name: str, users: int, right: float, start: int = 0, count: int = 2) -> list[list[Prediction]]:
    """Return predictions of several seeds on the same queries: some answers are changed after the fact."""
    base = invent(7, users, TASKS[name])
    random_ = random.Random(start)
    labels = TASKS[name].labels
    return [
        [replace(row, prediction=row.target if random_.random() < right else random_.choice(labels)) for row in base]
        for _ in range(count)
    ]


def slow_value(name: str, seeds: list[list[Prediction]], users: list[str]) -> float:
    """Pool the queries of `users`, who may repeat, and score them from scratch in each seed."""
    return float(
        np.mean(
            [score(name, [row for user in users for row in rows if row.user == user], TASKS[name]) for rows in seeds]
        )
    )


@pytest.mark.parametrize("name", TASKS)
def test_a_resample_is_the_metric_of_the_pooled_queries(name):
    ours, theirs = seeds_of(name, 6, 0.7, 1), seeds_of(name, 6, 0.4, 2)
    scores = [user_scores(name, rows, TASKS[name]) for rows in (ours, theirs)]
    found = bootstrap(scores, Effort(40, seed=5))
    weights = np.random.default_rng(5).multinomial(6, np.full(6, 1 / 6), size=40)
    drawn = np.random.default_rng([5, 1]).multinomial(2, np.full(2, 1 / 2), size=40)
    assert {2, 1, 0} <= {int(count) for row in drawn for count in row}
    for row, seeds in enumerate((ours, theirs)):
        for place, (times, seed_times) in enumerate(zip(weights, drawn, strict=True)):
            users = [user for user, count in zip(scores[0].users, times, strict=True) for _ in range(count)]
            again = [seed for seed, count in zip(seeds, seed_times, strict=True) for _ in range(count)]
            assert found[row, place] == pytest.approx(slow_value(name, again, users), abs=1e-12)


def test_seeds_that_disagree_widen_the_interval():
    users = tuple(f"u{user}" for user in range(40))
    gaps = np.random.default_rng(3).normal(0.5, 0.1, size=40)
    same, apart = (np.stack([gaps + shift, gaps - shift])[:, :, None] for shift in (0.0, 0.3))
    counts, none = np.ones(40), np.zeros((2, 40, 1))
    metric = get_metric("mae")
    widths = []
    for sums in (same, apart):
        found = compare(UserScores(metric, users, sums, counts), UserScores(metric, users, none, counts))
        assert found.difference == pytest.approx(gaps.mean())
        widths.append(found.high - found.low)
    assert widths[1] > 5 * widths[0]


@pytest.mark.parametrize("name", TASKS)
def test_value_and_users_value_against_scoring_from_scratch(name):
    seeds = seeds_of(name, 9, 0.6)
    found = estimate(user_scores(name, seeds, TASKS[name]), Effort(200))
    users = sorted({row.user for row in seeds[0]})
    assert found.value == pytest.approx(slow_value(name, seeds, users))
    own = []
    for user in users:
        rows = [[row for row in one if row.user == user] for one in seeds]
        # A user's own F1 is over the labels that the user has or was given.
        tasks = [
            replace(LABELS, labels=[x for x in LABELS.labels if any(x in (r.target, r.prediction) for r in one)])
            if name == "f1_macro"
            else TASKS[name]
            for one in rows
        ]
        own.append(np.mean([score(name, one, task) for one, task in zip(rows, tasks, strict=True)]))
    assert found.value_users == pytest.approx(np.mean(own))


@pytest.mark.parametrize("name", TASKS)
def test_the_exact_permutation_test_against_swapping_one_by_one(name):
    ours, theirs = seeds_of(name, 6, 0.8, 1), seeds_of(name, 6, 0.5, 2)
    users = sorted({row.user for row in ours[0]})
    differences = []
    for swaps in itertools.product((False, True), repeat=len(users)):
        swapped = dict(zip(users, swaps, strict=True))
        pairs = [list(zip(one, other, strict=True)) for one, other in zip(ours, theirs, strict=True)]
        first = [[b if swapped[a.user] else a for a, b in rows] for rows in pairs]
        second = [[a if swapped[a.user] else b for a, b in rows] for rows in pairs]
        differences.append(slow_value(name, first, users) - slow_value(name, second, users))
    wanted = np.mean([abs(one) >= abs(differences[0]) - 1e-12 for one in differences])
    p_value, test = permutation_test(user_scores(name, ours, TASKS[name]), user_scores(name, theirs, TASKS[name]))
    assert p_value == pytest.approx(wanted)
    assert test.endswith("exact")


def test_a_mean_is_tested_by_flipping_the_signs_of_users_summed_differences():
    ours, theirs = seeds_of("mae", 30, 0.6, 1), seeds_of("mae", 30, 0.5, 2)
    scores = [user_scores("mae", rows, STARS) for rows in (ours, theirs)]
    gaps = (scores[0].sums - scores[1].sums).mean(axis=0)[:, 0]
    signs = np.random.default_rng(9).choice([-1, 1], size=(40_000, len(gaps)))
    wanted = np.mean(np.abs(signs @ gaps) >= abs(gaps.sum()) - 1e-9)
    p_value, test = permutation_test(*scores, Effort(draws=40_000))
    assert p_value == pytest.approx(wanted, abs=0.015)
    assert test == "paired permutation over users, 40000 draws"


def test_random_swaps_agree_with_all_of_them():
    ours, theirs = (
        user_scores("f1_macro", seeds_of("f1_macro", 17, right, k), LABELS) for k, right in ((1, 0.7), (2, 0.5))
    )
    codes = np.arange(2**17)
    keep = ((codes[:, None] >> np.arange(17)) & 1).astype(float)
    first, second = (keep @ a.sums + (1 - keep) @ b.sums for a, b in ((ours, theirs), (theirs, ours)))
    total = ours.counts.sum()
    differences = (ours.metric.finish(first, total) - ours.metric.finish(second, total)).mean(axis=0)
    wanted = np.mean(np.abs(differences) >= abs(differences[-1]) - 1e-12)
    p_value, test = permutation_test(ours, theirs)
    assert 0.005 < wanted < 0.5  # a p-value that could be got wrong
    assert p_value == pytest.approx(wanted, abs=0.015)
    assert test == "paired permutation over users, 10000 draws"


def test_a_drawn_p_value_is_never_zero():
    rows = [Prediction(id=k, user=f"u{k}", prompt="", target="a", prediction="a") for k in range(40)]
    wrong = [replace(row, prediction="b") for row in rows]
    p_value, _ = permutation_test(*(user_scores("accuracy", [one], LABELS) for one in (rows, wrong)), Effort(draws=999))
    assert p_value == 1 / 1000


def test_users_with_equal_scores_do_not_change_the_p_value():
    few_ours, few_theirs = seeds_of("accuracy", 8, 0.9, 1, 1)[0], seeds_of("accuracy", 8, 0.2, 2, 1)[0]
    same = [replace(row, id=row.id + 1000, user=f"same {row.user}") for row in invent(1, 60, LABELS)]
    small = permutation_test(*(user_scores("accuracy", [rows], LABELS) for rows in (few_ours, few_theirs)))
    large = permutation_test(*(user_scores("accuracy", [rows + same], LABELS) for rows in (few_ours, few_theirs)))
    assert small == large


def test_equal_methods_have_p_one_and_no_difference():
    scores = user_scores("rmse", seeds_of("rmse", 20, 0.5), STARS)
    found = compare(scores, scores, Effort(100))
    assert (found.difference, found.low, found.high, found.p_value) == (0, 0, 0, 1)


def test_under_the_null_p_values_are_not_too_small():
    p_values = []
    for trial in range(300):
        both = [user_scores("accuracy", seeds_of("accuracy", 25, 0.5, 2 * trial + k, 1), LABELS) for k in (0, 1)]
        p_values.append(permutation_test(*both, Effort(draws=300, seed=trial))[0])
    for level in (0.05, 0.2, 0.5):
        share = np.mean(np.asarray(p_values) <= level)
        # Binomial spread over 300 trials; ties make a discrete test a little conservative.
        assert level - 0.12 * (level > 0.1) - 0.04 <= share <= level + 3 * math.sqrt(level * (1 - level) / 300)


def test_a_real_difference_is_found():
    better, worse = (
        user_scores("accuracy", seeds_of("accuracy", 60, right, k), LABELS) for k, right in ((1, 0.8), (2, 0.3))
    )
    found = compare(better, worse)
    assert found.low > 0 and found.p_value < 0.01 and found.relative > 0
    assert found.difference == pytest.approx(better.values().mean() - worse.values().mean())
    assert found.relative == pytest.approx(found.difference / worse.values().mean())


def test_relative_is_positive_when_an_error_falls():
    better, worse = (user_scores("mae", seeds_of("mae", 40, right, k), STARS) for k, right in ((1, 0.9), (2, 0.3)))
    found = compare(better, worse)
    assert found.difference < 0 < found.relative
    assert compare(worse, better).relative < 0


def test_an_interval_covers_about_as_often_as_it_says():
    hits, trials = 0, 200
    random_ = np.random.default_rng(0)
    for trial in range(trials):
        share = random_.beta(6, 4, size=40)  # users differ, so queries of one user are not independent
        rows = [
            Prediction(id=10 * user + query, user=f"{user}", prompt="", target="a", prediction="a" if hit else "b")
            for user in range(40)
            for query, hit in enumerate(random_.random(8) < share[user])
        ]
        found = estimate(user_scores("accuracy", [rows], LABELS), Effort(400, seed=trial))
        hits += found.low <= 0.6 <= found.high
    assert 0.89 <= hits / trials <= 0.99


@settings(deadline=None, max_examples=40)
@given(st.integers(0, 10_000), st.integers(2, 12), st.sampled_from(["accuracy", "mae", "rmse"]))
def test_an_interval_contains_its_value(seed, users, name):
    found = estimate(user_scores(name, [invent(seed, users, TASKS[name])], TASKS[name]), Effort(500, seed=seed))
    assert found.low - 1e-12 <= found.value <= found.high + 1e-12


@settings(deadline=None, max_examples=20)
@given(st.randoms(use_true_random=False), st.sampled_from(list(TASKS)))
def test_the_order_of_predictions_does_not_matter(shuffler, name):
    ours, theirs = seeds_of(name, 15, 0.6, 1), seeds_of(name, 15, 0.5, 2)
    wanted = compare(*(user_scores(name, rows, TASKS[name]) for rows in (ours, theirs)), Effort(100, 200))
    for rows in (*ours, *theirs):
        shuffler.shuffle(rows)
    found = compare(*(user_scores(name, rows, TASKS[name]) for rows in (ours, theirs)), Effort(100, 200))
    assert found == wanted


def test_seeds_are_repeats_not_more_data():
    once, thrice = seeds_of("accuracy", 30, 0.5, 1, 1), seeds_of("accuracy", 30, 0.7, 2, 1)
    first = compare(*(user_scores("accuracy", rows, LABELS) for rows in (once, thrice)))
    again = compare(*(user_scores("accuracy", rows * 3, LABELS) for rows in (once, thrice)))
    assert again.p_value == first.p_value
    assert (again.low, again.high) == pytest.approx((first.low, first.high))


@given(st.lists(st.floats(0, 1), max_size=7))
def test_holm_against_its_definition(p_values):
    # Reject in order of size while p <= level / (hypotheses left); adjusted p is the smallest level that rejects.
    def slow(place: int) -> float:
        ordered = sorted(range(len(p_values)), key=lambda one: p_values[one])
        until = ordered[: ordered.index(place) + 1]
        return min(1.0, max((len(p_values) - rank) * p_values[one] for rank, one in enumerate(until)))

    assert holm(p_values) == pytest.approx([slow(place) for place in range(len(p_values))])


def test_holm_worked_out_by_hand():
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])


def test_the_smallest_detectable_difference_is_detected_four_times_in_five():
    smallest = minimal_detectable_difference(sd=0.3, users=100)
    assert smallest == pytest.approx(2.8016 * 0.03, rel=1e-4)
    draws = np.random.default_rng(0).normal(smallest, 0.3, size=(4000, 100))
    shown = np.abs(draws.mean(axis=1)) / (0.3 / 10) > 1.959964
    assert shown.mean() == pytest.approx(0.8, abs=0.02)


def test_one_user_has_a_value_but_no_interval():
    rows = invent(0, 1, LABELS)
    found = estimate(user_scores("accuracy", [rows], LABELS), Effort(100))
    assert math.isnan(found.low) and math.isnan(found.high) and 0 <= found.value <= 1
    assert math.isnan(compare(*[user_scores("accuracy", [rows], LABELS)] * 2, Effort(100)).resolvable)


def test_what_cannot_be_paired_is_refused():
    rows = invent(0, 5, LABELS)
    scores = user_scores("accuracy", [rows], LABELS)
    with pytest.raises(DataError, match="same queries"):
        compare(scores, user_scores("accuracy", [rows[:-1]], LABELS))
    with pytest.raises(DataError, match="cannot be compared"):
        compare(scores, user_scores("f1_macro", [rows], LABELS))
    with pytest.raises(DataError, match="seeds answer different queries"):
        user_scores("accuracy", [rows, rows[1:]], LABELS)
    with pytest.raises(DataError, match="no predictions"):
        user_scores("accuracy", [[]], LABELS)
    assert set(METRICS) >= set(TASKS)


def test_a_hundred_users_of_fifty_queries_take_little_time():
    labels = TaskInfo("many", "classification", [f"label {number}" for number in range(15)])
    random_ = random.Random(0)
    both = []
    for _ in range(2):
        rows = [
            Prediction(
                id=id_, user=f"u{id_ % 100}", prompt="", target=labels.labels[id_ % 15],
                prediction=random_.choice(labels.labels),
            )
            for id_ in range(5000)
        ]  # fmt: skip
        both.append(user_scores("f1_macro", [rows], labels))
    start = time.perf_counter()
    compare(*both)
    assert time.perf_counter() - start < 2


def test_standings_name_the_best_and_what_cannot_be_told_from_it():
    draw = np.random.default_rng(3)

    def made(right: float) -> UserScores:
        hits = (draw.random((40, 10)) < right).astype(float)
        return UserScores(get_metric("accuracy"), tuple(f"u{n}" for n in range(40)), hits.sum(1)[None, :, None],
                          np.full(40, 10.0))  # fmt: skip

    good, same, bad = made(0.8), made(0.8), made(0.4)
    places = dict(zip(("good", "same", "bad"), standings([good, same, bad], Effort(500)), strict=True))
    assert places["bad"] == "" and sorted([places["good"], places["same"]]) == ["best", "tied"]
    assert standings([bad, bad]) == ["best", "tied"]
    alone = good.only({"u0"})
    assert standings([alone, bad.only({"u0"})])[0] in {"best", "tied"}
