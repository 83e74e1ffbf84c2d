"""The user-level membership attack: its halves, its score against a slow form, and what it finds."""

from __future__ import annotations

from statistics import NormalDist, fmean

import numpy as np
import pytest

from experiments.residue import ece, halves, rates, scores

MODELS, USERS = 8, 40


def drawn(gap: float, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Losses (M, U) that are lower by `gap` standard deviations with the user, and who is in which model."""
    draw = np.random.default_rng(seed)
    users = [str(at) for at in range(USERS)]
    inside = np.array([[user not in out for user in users] for out in halves(users, MODELS, seed)])
    return draw.normal(draw.normal(size=USERS), 0.1, (MODELS, USERS)) - 0.1 * gap * inside, inside


def test_each_user_is_in_half_of_the_models() -> None:
    _, inside = drawn(0)
    assert (inside.sum(0) == MODELS // 2).all() and (inside.sum(1) == USERS // 2).all()
    assert (inside[::2] == ~inside[1::2]).all() and not (inside[0] == inside[2]).all()


def test_the_score_is_the_log_likelihood_ratio_by_the_other_models() -> None:
    losses, inside = drawn(1)
    found = scores(losses, inside)
    for at in range(MODELS):
        others = [model for model in range(MODELS) if model != at]
        means = [
            {side: fmean(losses[m, u] for m in others if inside[m, u] == side) for side in (True, False)}
            for u in range(USERS)
        ]
        squares = sum((losses[m, u] - means[u][bool(inside[m, u])]) ** 2 for m in others for u in range(USERS))
        sigma = (squares / (USERS * (len(others) - 2))) ** 0.5
        for u in range(USERS):
            ways = [np.log(NormalDist(means[u][side], sigma).pdf(losses[at, u])) for side in (True, False)]
            assert found[at, u] == pytest.approx(ways[0] - ways[1], rel=1e-6, abs=1e-9)


@pytest.mark.parametrize(("gap", "low", "high"), [(0.0, 0.4, 0.6), (5.0, 0.97, 1.0)])
def test_a_member_is_found_if_the_loss_tells(gap: float, low: float, high: float) -> None:
    losses, inside = drawn(gap)
    found = rates(scores(losses, inside), inside)
    assert low <= found["auc"] <= high and found["tpr_at_1%"] <= found["tpr_at_5%"]
    assert (found["tpr_at_5%"] > 0.8) == (gap > 0)


def test_calibration_error_is_the_weighted_gap_of_the_bins() -> None:
    sure, right = np.array([0.95, 0.95, 0.55, 0.52]), np.array([1.0, 0.0, 1.0, 1.0])
    assert ece(sure, right) == pytest.approx((abs(1 - 1.9) + abs(2 - 1.07)) / 4)
    assert ece(np.ones(7), np.ones(7)) == 0
