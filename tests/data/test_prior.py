"""The user prior against its formula, item by item, and the choice of its two numbers."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from proper.data.prior import DECAYS, SMOOTHINGS, choose, earlier_priors, user_prior

LABELS = 4
ANSWERS = st.lists(st.integers(0, LABELS - 1), max_size=12)
POPULATION = st.lists(st.integers(1, 9), min_size=LABELS, max_size=LABELS).map(
    lambda counts: np.asarray(counts) / sum(counts)
)
DECAY, SMOOTHING = st.sampled_from(DECAYS), st.sampled_from(SMOOTHINGS)


def slow_prior(answers, population, decay, smoothing):
    """The formula of the method."""
    n, shares = len(answers), []
    for label in range(LABELS):
        over = sum(decay ** (n - i) * (answers[i - 1] == label) for i in range(1, n + 1))
        under = sum(decay ** (n - i) for i in range(1, n + 1)) + smoothing
        shares.append((over + smoothing * population[label]) / under)
    return shares


@given(ANSWERS, POPULATION, DECAY, SMOOTHING)
def test_the_prior_is_the_formula(answers, population, decay, smoothing):
    found = user_prior(np.asarray(answers, dtype=np.int64), population, decay, smoothing)
    assert found == pytest.approx(slow_prior(answers, population, decay, smoothing), abs=1e-12)
    assert found.sum() == pytest.approx(1) and (found > 0).all()


@given(ANSWERS.filter(bool), POPULATION, DECAY, SMOOTHING)
def test_an_items_prior_knows_the_items_before_it(answers, population, decay, smoothing):
    found = earlier_priors(np.asarray(answers, dtype=np.int64), population, decay, smoothing)
    wanted = [slow_prior(answers[:at], population, decay, smoothing) for at in range(len(answers))]
    assert found == pytest.approx(np.asarray(wanted), abs=1e-12)


@given(st.lists(st.tuples(ANSWERS, ANSWERS.filter(bool)), min_size=1, max_size=4), POPULATION)
def test_no_other_numbers_of_the_grid_have_a_lower_loss(histories, population):
    def loss(decay: float, smoothing: float) -> float:
        shares = [slow_prior(older, population, decay, smoothing) for older, _ in histories]
        return -sum(math.log(own[y]) for own, (_, held) in zip(shares, histories, strict=True) for y in held)

    arrays = [(np.asarray(a, dtype=np.int64), np.asarray(b, dtype=np.int64)) for a, b in histories]
    chosen = loss(*choose(arrays, population))
    assert chosen <= min(loss(decay, smoothing) for decay in DECAYS for smoothing in SMOOTHINGS) + 1e-9


def test_recent_habits_decay_and_steady_ones_do_not():
    population = np.full(LABELS, 0.25)
    turned = [(np.asarray([0] * 20 + [1] * 3), np.asarray([1, 1, 1]))] * 5
    steady = [(np.asarray([0, 0, 1, 0, 0, 0, 1, 0, 0, 0]), np.asarray([0, 0, 0, 1]))] * 5
    assert choose(turned, population)[0] == DECAYS[0] and choose(steady, population)[0] > 0.9
    assert choose([], population) == (1.0, 1.0)
