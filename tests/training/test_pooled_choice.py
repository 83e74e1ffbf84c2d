"""One choice of passes and scale for all users: the best mean, users who left early, equal choices."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from proper.training.jobs import PARTS, passes_of
from proper.training.pooled_choice import ALL_PASSES, Choice, TrialCurve, choose

SCALES = (0.25, 0.5, 1.0)


def curve(grid: list[list[float]], full: int = 8, user: str = "u") -> TrialCurve:
    return TrialCurve(user, 10, 2, full, SCALES, 1.0, grid, [[0.1] * 3 for _ in grid])


@st.composite
def curves(draw: st.DrawFn) -> list[TrialCurve]:
    made = []
    for at in range(draw(st.integers(1, 6))):
        full = draw(st.integers(1, 9))
        most = len({passes_of(full, part) for part in range(1, PARTS + 1)})
        loss = st.sampled_from([0.5, 0.75, 1.0, 1.25])
        grid = st.lists(st.lists(loss, min_size=3, max_size=3), min_size=1, max_size=most)
        made.append(curve(draw(grid), full, f"u{at}"))
    return made


@given(curves())
def test_the_choice_has_the_best_lower_bound(found: list[TrialCurve]) -> None:
    def gains_at(choice: Choice) -> list[float]:
        gains = []
        for one in found:
            passes = sorted({passes_of(one.full, part) for part in range(1, PARTS + 1)})
            at = min(passes.index(passes_of(one.full, choice.part)), len(one.grid) - 1)
            gains.append(1.0 - one.grid[at][SCALES.index(choice.scale)])
        return gains

    def bound(choice: Choice) -> float:
        gains = torch.tensor(gains_at(choice), dtype=torch.float64)
        return float(gains.mean() - (gains.std() / len(gains) ** 0.5 if len(gains) > 1 else 0))

    best = choose(found)
    everything = [Choice(part, scale) for part in range(1, PARTS + 1) for scale in SCALES]
    assert bound(best) == pytest.approx(max(map(bound, everything)), abs=1e-9)
    assert [one.at(best).gain for one in found] == gains_at(best)


def test_of_equal_choices_the_least_training_and_scale_is_taken() -> None:
    assert choose([curve([[0.8] * 3] * 4)]) == Choice(1, 0.25)


def test_a_gain_that_all_share_is_better_than_a_larger_one_of_a_few() -> None:
    few = [curve([[0.9, 0.4 if at == 0 else 1.1, 1.0]], full=1) for at in range(5)]
    many = [curve([[0.9, 0.85, 1.0]], full=1) for at in range(5)]
    assert choose(few) == Choice(1, 0.25) and choose(many) == Choice(1, 0.5)


def test_a_user_who_left_early_counts_with_the_last_measurement() -> None:
    left, stayed = curve([[0.5, 0.5, 0.5]]), curve([[1.0] * 3, [1.0] * 3, [1.0, 0.5, 1.0], [1.0] * 3])
    assert choose([left, stayed]) == Choice(3, 0.5)
    trial = left.at(Choice(3, 0.5))
    assert (trial.group_loss, trial.user_loss, trial.passes, trial.held_out) == (1.0, 0.5, 6, 2)


def test_without_trials_all_is_trained() -> None:
    assert choose([]) == ALL_PASSES == Choice(PARTS, 1.0)
