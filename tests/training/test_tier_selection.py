"""Who gets an adapter: gains shrunk toward those of similar users, and the user's own gain where that is set."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from proper.config import TiersConfig
from proper.training.tier_selection import Trial, decide, shrunk_gains


def trial(user: str, items: int, gain: float, passes: int = 1, held_out: int = 1, spread: float = 0.0) -> Trial:
    return Trial(user, items, 1.0, 1.0 - gain, passes, held_out, spread)


def test_a_long_history_decides_for_itself_where_that_is_set() -> None:
    trials = [trial("better", 30, 0.1), trial("worse", 30, -0.1), trial("same", 30, 0.0)]
    decisions = decide(trials, torch.eye(3), TiersConfig(pool_below=10))
    assert [decision.up for decision in decisions] == [True, False, False]
    assert [decision.user for decision in decisions] == ["better", "worse", "same"]
    assert not any(decision.pooled for decision in decisions)
    assert "lowers" in decisions[0].reason and "does not lower" in decisions[1].reason


def test_without_a_second_item_of_anybody_the_nearest_users_decide() -> None:
    trials = [trial("a", 5, -0.1), trial("b", 40, 0.5), trial("c", 5, 0.1), trial("d", 40, -0.5)]
    embeddings = torch.tensor([[1.0, 0.0], [10.0, 1.0], [-1.0, 0.1], [-3.0, 0.0]])
    decisions = {d.user: d for d in decide(trials, embeddings, TiersConfig(neighbours=2, pool_below=10))}
    assert decisions["a"].up and decisions["a"].pooled, "its neighbour b gained more than it lost"
    assert not decisions["c"].up and decisions["c"].pooled
    assert decisions["b"].up and not decisions["d"].up and not decisions["b"].pooled


def test_the_number_of_items_that_pools() -> None:
    trials = [trial("nine", 9, -0.1), trial("ten", 10, -0.1), trial("rich", 99, 1.0)]
    decisions = decide(trials, torch.ones(3, 2), TiersConfig(pool_below=10))
    assert [decision.up for decision in decisions] == [True, False, True]
    assert [d.up for d in decide(trials, torch.ones(3, 2), TiersConfig(pool_below=0))] == [False, False, True]
    assert [d.up for d in decide(trials, torch.ones(3, 2), TiersConfig())] == [True, True, True]


def test_no_pass_means_no_adapter() -> None:
    trials = [trial("a", 5, 0.3, passes=0), trial("b", 5, 0.3), trial("c", 50, 0.3, passes=0)]
    decisions = decide(trials, torch.ones(3, 2), TiersConfig())
    assert [decision.up for decision in decisions] == [False, True, False]
    assert "no pass" in decisions[0].reason


def test_fewer_users_than_neighbours_and_none_at_all() -> None:
    assert [d.up for d in decide([trial("a", 3, 0.1)], torch.zeros(1, 4), TiersConfig())] == [True]
    assert decide([], torch.zeros(0, 4), TiersConfig()) == []


@given(
    st.lists(st.tuples(st.floats(-1, 1), st.integers(1, 20), st.floats(0, 5)), min_size=1, max_size=30),
)
def test_a_shrunk_gain_lies_between_the_users_and_the_mean(users: list[tuple[float, int, float]]) -> None:
    trials = [trial(f"u{at}", 30, gain, 1, n, spread) for at, (gain, n, spread) in enumerate(users)]
    mean = sum(one.gain for one in trials) / len(trials)
    for one, shrunk in zip(trials, shrunk_gains(trials, torch.ones(len(trials), 2), 99), strict=True):
        assert min(one.gain, mean) - 1e-9 <= shrunk <= max(one.gain, mean) + 1e-9


def test_shrunk_gains_are_nearer_to_the_true_ones_and_decide_better() -> None:
    """Simulated users with known gains: N(.02, .05^2), two to six held-out items with a noise of .3 each."""
    generator = torch.Generator().manual_seed(0)
    true = 0.02 + 0.05 * torch.randn(2000, generator=generator, dtype=torch.float64)
    trials = []
    for at, gain in enumerate(true.tolist()):
        n = 2 + at % 5
        items = gain + 0.3 * torch.randn(n, generator=generator, dtype=torch.float64)
        trials.append(trial(f"u{at}", 30, float(items.mean()), 1, n, float(((items - items.mean()) ** 2).sum())))
    own = torch.tensor([one.gain for one in trials], dtype=torch.float64)
    shrunk = torch.tensor(shrunk_gains(trials, torch.ones(len(trials), 2), 10**9), dtype=torch.float64)
    assert (shrunk - true).square().mean() < 0.25 * (own - true).square().mean()
    assert true[shrunk > 0].sum() > 1.2 * true[own > 0].sum()
    # Posterior mean with the true parameters, as the textbook has it.
    n = torch.tensor([one.held_out for one in trials])
    weights = 0.05**2 / (0.05**2 + 0.3**2 / n)
    oracle = 0.02 + weights * (own - 0.02)
    assert (shrunk - true).square().mean() == pytest.approx(float((oracle - true).square().mean()), rel=0.1)
