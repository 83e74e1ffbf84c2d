"""What counts as the usual answer."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from proper.methods.trivial import usual

STARS = ["0.5", "1.0", "2.0", "3.0", "4.0"]


def test_the_most_frequent_label_and_the_newest_of_equals():
    assert usual({"a": 1, "b": 3, "c": 2}, "classification", ["a", "b", "c"]) == "b"
    assert usual({"a": 2, "b": 1, "c": 2}, "classification", ["a", "b", "c"]) == "c"
    assert usual({"one title": 1, "another": 1}, "generation", []) == "another"
    assert usual({}, "classification", ["a", "b"]) == ""


def test_a_mean_rating_is_rounded_to_the_scale():
    assert usual({"4.0": 1, "1.0": 2}, "rating", STARS) == "2.0"
    assert usual({"1.0": 1, "0.5": 1}, "rating", STARS) == "0.5"
    assert usual({"4.0": 3, "2.0": 3}, "rating", STARS) == "3.0"


@given(st.dictionaries(st.sampled_from(STARS), st.integers(1, 9), min_size=1))
def test_no_rating_is_nearer_to_the_mean(counts):
    mean = sum(float(star) * count for star, count in counts.items()) / sum(counts.values())
    chosen = float(usual(counts, "rating", STARS))
    assert abs(chosen - mean) == pytest.approx(min(abs(float(star) - mean) for star in STARS))
