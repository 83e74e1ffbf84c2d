"""Who moves up."""

from __future__ import annotations

import torch

from proper.config import TiersConfig
from proper.training.tier_selection import Trial, decide


def trial(user: str, items: int, gain: float, passes: int = 1) -> Trial:
    return Trial(user, items, group_loss=1.0, user_loss=1.0 - gain, passes=passes)


def test_a_long_history_decides_for_itself() -> None:
    trials = [trial("better", 30, 0.1), trial("worse", 30, -0.1), trial("same", 30, 0.0)]
    decisions = decide(trials, torch.eye(3), TiersConfig())
    assert [decision.up for decision in decisions] == [True, False, False]
    assert [decision.user for decision in decisions] == ["better", "worse", "same"]
    assert not any(decision.pooled for decision in decisions)
    assert "lowers" in decisions[0].reason and "does not lower" in decisions[1].reason


def test_a_short_history_asks_its_nearest_users() -> None:
    trials = [trial("a", 5, -0.1), trial("b", 40, 0.5), trial("c", 5, 0.1), trial("d", 40, -0.5)]
    embeddings = torch.tensor([[1.0, 0.0], [10.0, 1.0], [-1.0, 0.1], [-3.0, 0.0]])
    decisions = {d.user: d for d in decide(trials, embeddings, TiersConfig(neighbours=2))}
    assert decisions["a"].up and decisions["a"].pooled, "its neighbour b gained more than it lost"
    assert not decisions["c"].up and decisions["c"].pooled
    assert decisions["b"].up and not decisions["d"].up and not decisions["b"].pooled


def test_the_number_of_items_that_pools() -> None:
    trials = [trial("nine", 9, -0.1), trial("ten", 10, -0.1), trial("rich", 99, 1.0)]
    decisions = decide(trials, torch.ones(3, 2), TiersConfig(pool_below=10))
    assert [decision.up for decision in decisions] == [True, False, True]
    assert [d.up for d in decide(trials, torch.ones(3, 2), TiersConfig(pool_below=0))] == [False, False, True]


def test_no_pass_that_helped_means_no_adapter() -> None:
    trials = [trial("a", 5, 0.3, passes=0), trial("b", 5, 0.3), trial("c", 50, 0.3, passes=0)]
    decisions = decide(trials, torch.ones(3, 2), TiersConfig())
    assert [decision.up for decision in decisions] == [False, True, False]
    assert "no pass" in decisions[0].reason


def test_fewer_users_than_neighbours_and_none_at_all() -> None:
    assert [d.up for d in decide([trial("a", 3, 0.1)], torch.zeros(1, 4), TiersConfig())] == [True]
    assert decide([], torch.zeros(0, 4), TiersConfig()) == []
