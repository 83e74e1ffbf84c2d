"""The smallest difference that can show, against the formula's corners and a simulation."""

from __future__ import annotations

import math

import numpy as np
import pytest

from proper.evaluation.power import LEAST_USERS, Power, smallest_difference

Z = 1.959964 + 0.841621


def test_independent_queries_are_the_textbook_formula():
    assert smallest_difference([1] * 100, 0.5) == pytest.approx(Z * 0.5 / 10, rel=1e-5)
    assert smallest_difference([4] * 25, 0.5, 0.0) == pytest.approx(Z * 0.5 / 10, rel=1e-5)


def test_queries_that_agree_entirely_count_once():
    assert smallest_difference([7] * 25, 0.5, 1.0) == pytest.approx(Z * 0.5 / 5, rel=1e-5)


def test_a_simulated_test_finds_it_in_four_of_five_runs():
    users, queries, spread, correlation = 60, 5, 0.5, 0.1
    difference = smallest_difference([queries] * users, spread, correlation)
    draw = np.random.default_rng(0)
    shared = draw.normal(0, spread * math.sqrt(correlation), (4000, users, 1))
    own = draw.normal(0, spread * math.sqrt(1 - correlation), (4000, users, queries))
    means = (difference + shared + own).mean(2)
    z = means.mean(1) / (means.std(1, ddof=1) / math.sqrt(users))
    assert (np.abs(z) > 1.96).mean() == pytest.approx(0.8, abs=0.03)


def test_users_too_few_for_any_p_below_the_level_can_show_nothing():
    assert LEAST_USERS == 6 and math.isnan(smallest_difference([9] * 5, 0.5)) and smallest_difference([9] * 6, 0.5) > 0
    line = Power("accuracy", math.nan, "", 5, 45).line()
    assert line.endswith(
        "45 queries of 5 users cannot show any difference: users are the unit of the test, and p < .05 "
        "needs 6 target users or more"
    )
    enough = Power("accuracy", 0.2, "so", 6, 54).line()
    assert enough.endswith(
        "54 queries of 6 users can show a difference of 0.200 in accuracy (p < .05 in 80 % of runs), if so"
    )
