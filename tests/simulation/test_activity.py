"""The law of activity against exact probabilities, the daily cycle against its integral."""

from __future__ import annotations

import numpy as np
import pytest

from proper.simulation.activity import HEAD, Arrival, DailyCycle, ZipfLaw, arrivals, hash_of, mixed_bits
from proper.simulation.schema import ActivityConfig, TokenCounts


def exact(users: int, exponent: float, shift: float) -> np.ndarray:
    weights = (np.arange(1, users + 1) + shift) ** -exponent
    return weights / weights.sum()


@pytest.mark.parametrize("exponent", [0.0, 0.8, 1.0, 1.7])
@pytest.mark.parametrize(("users", "shift"), [(300, 0.0), (4 * HEAD, 5.0)])
def test_draws_have_the_exact_distribution(users: int, shift: float, exponent: float) -> None:
    law, count = ZipfLaw(users, exponent, shift), 200_000
    wanted = np.cumsum(exact(users, exponent, shift))
    ranks = law.draw(np.random.default_rng(0), count)
    assert ranks.min() >= 1 and ranks.max() <= users
    found = np.searchsorted(np.sort(ranks), np.arange(1, users + 1), side="right") / count
    assert np.abs(found - wanted).max() < 1.95 / np.sqrt(count), "Kolmogorov and Smirnov's bound at 0.1 %"
    np.testing.assert_allclose(law.weights(np.arange(1, users + 1)), exact(users, exponent, shift), rtol=1e-6)


def test_a_hundred_million_users_need_no_memory() -> None:
    ranks = ZipfLaw(10**8, 0.8, 10.0).draw(np.random.default_rng(0), 100_000)
    assert ranks.max() <= 10**8
    start, middle, end = (float(rank + 10.5) ** 0.2 for rank in (0, 10**6, 10**8))
    assert (ranks > 10**6).mean() == pytest.approx((end - middle) / (end - start), abs=0.01), "the integral's share"


def test_a_slice_has_every_so_many_th_user() -> None:
    law, part = ZipfLaw(3000, 0.9, 2.0), ZipfLaw(3000, 0.9, 2.0).slice(1 / 3)
    middles = law.weights(np.arange(2, 3001, 3))
    assert part.users == 1000
    np.testing.assert_allclose(part.weights(np.arange(1, 1001)), middles / middles.sum(), rtol=1e-9)


def test_requests_follow_the_daily_cycle() -> None:
    cycle = DailyCycle(rate=0.5, swing=0.5, peak_hour=20.0)
    times = np.concatenate(list(cycle.times(np.random.default_rng(1))))
    assert (np.diff(times) >= 0).all()
    hours = np.bincount([cycle.hour(time) for time in times.tolist()], minlength=24)
    edges = np.linspace(0, 86_400, 25)
    integral = 0.5 * (np.diff(edges) - 0.5 * 86_400 / (2 * np.pi) * np.diff(np.sin(2 * np.pi * edges / 86_400)))
    wanted = np.roll(integral, 8)  # the day starts at 8, twelve hours before the peak
    assert np.abs(hours - wanted).max() < 5 * np.sqrt(wanted.max())
    assert hours[19:21].min() > 2 * hours[7:9].max()


def test_a_shortened_day_keeps_the_rate() -> None:
    cycle = DailyCycle(rate=50.0, swing=0.6, peak_hour=20.0, length=400.0)
    count = sum(map(len, cycle.times(np.random.default_rng(1))))
    assert count == pytest.approx(20_000, abs=5 * 141)


def test_equal_seeds_give_equal_requests_and_token_counts_their_mean() -> None:
    law, cycle = ZipfLaw(1000, 0.8), DailyCycle(1.0, 0.5, 20.0, 6_000.0)
    activity = ActivityConfig(prompt_tokens=TokenCounts(mean=100, cv=0.5), answer_tokens=TokenCounts(mean=7))
    found = list(arrivals(law, cycle, activity, 3))
    assert found == list(arrivals(law, cycle, activity, 3))
    assert found != list(arrivals(law, cycle, activity, 4))
    assert isinstance(found[0], Arrival) and {each.answer for each in found} == {7}
    prompts = np.array([each.prompt for each in found])
    assert prompts.mean() == pytest.approx(100, rel=0.05)
    assert prompts.std() / prompts.mean() == pytest.approx(0.5, rel=0.1)


def test_both_hashes_are_one() -> None:
    values = [0, 1, 2**40 + 17, 2**64 - 1]
    assert mixed_bits(np.array(values, np.uint64)).tolist() == [hash_of(value) for value in values]
