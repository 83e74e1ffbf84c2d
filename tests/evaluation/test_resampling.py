"""Draws of users do not depend on the size of the chunks that they come in."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from proper.evaluation import resampling


@given(st.integers(1, 300), st.integers(1, 60), st.integers(0, 3), st.integers(1, 70_000))
@settings(deadline=None)
def test_kept_resamples_are_those_that_are_drawn_anew(users, resamples, seed, width):
    drawn = np.random.default_rng(seed).multinomial(users, np.full(users, 1.0 / users), size=resamples)
    for most in (resampling._KEPT_CELLS, 0):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(resampling, "_KEPT_CELLS", most)
            patch.setattr(resampling, "_CELLS", 1 << 16)  # several pieces
            resampling._kept_resamples.cache_clear()
            found = list(resampling.user_resamples(users, resamples, seed, width))
        np.testing.assert_array_equal(np.concatenate(found), drawn)


@pytest.mark.parametrize("users", [3, 40])
def test_swaps_are_those_of_one_chunk(users: int, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = np.concatenate(list(resampling.random_swaps(users, 50, 1, 5)))
    monkeypatch.setattr(resampling, "_CELLS", 1 << 8)
    pieces = list(resampling.random_swaps(users, 50, 1, 5))
    assert len(pieces) > 1
    np.testing.assert_array_equal(np.concatenate(pieces), whole)
