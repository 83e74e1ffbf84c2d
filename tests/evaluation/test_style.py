"""Measures of style: features of texts, matches with the true answers, distances from a user's own history."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from proper.errors import DataError
from proper.evaluation.metrics import STYLE_DISTANCES, STYLE_METRICS, Prediction, TaskInfo, score
from proper.evaluation.results import RawResults, build_results
from proper.evaluation.statistics import Effort
from proper.evaluation.style import MATCHES, case, distances, habits_of, length_match, prefix, punctuation

TITLES = TaskInfo("titles", "generation")
TEXTS = st.text("aB. :é?", max_size=12)
ANSWERS = st.lists(TEXTS, min_size=1, max_size=6)


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("refs: pack tighter", ("refs", "lower", "")),
        ("t/lib-git: Fix it.", ("t/lib-git", "lower", ".")),
        ("Say hello!", ("", "upper", "!")),
        ("see https://x", ("", "lower", "")),
        ("at 10:30 sharp", ("", "lower", "")),
        ("two words: no prefix", ("", "lower", "")),
        ("[PATCH] é", ("", "upper", "")),
        ("...", ("", "", ".")),
        ("", ("", "", "")),
        ("变更：", ("", "", "")),
    ],
)
def test_the_features_of_a_text(text: str, found: tuple[str, str, str]) -> None:
    assert (prefix(text), case(text), punctuation(text)) == found


@given(one=TEXTS, other=TEXTS)
def test_matches_are_shares_that_are_1_for_the_same_text(one: str, other: str) -> None:
    for match in MATCHES.values():
        assert 0 <= match(one, other) == match(other, one) <= 1
        assert match(one, one) == 1
    assert length_match("a b c d", "a") == 0.25


@given(one=ANSWERS, other=ANSWERS)
def test_distances_are_total_variation_and_the_gap_of_means(one: list[str], other: list[str]) -> None:
    found = distances(habits_of(one), habits_of(other))
    features = (lambda text: bool(prefix(text)), case, punctuation)
    total = 0.0
    for feature in features:
        for value in {feature(text) for text in one + other}:
            shares = [sum(feature(text) == value for text in texts) / len(texts) for texts in (one, other)]
            total += abs(shares[0] - shares[1]) / 2
    gap = [sum(len(text.split()) for text in texts) / len(texts) for texts in (one, other)]
    assert found == pytest.approx({"style_distance": total / 3, "style_length_gap": abs(gap[0] - gap[1])})
    assert distances(habits_of(one), habits_of(one * 2)) == pytest.approx({name: 0 for name in found})


def rows(answer: str, users: int = 6) -> list[Prediction]:
    """Two queries of each user, whose own habit is a prefix for even users."""
    targets = ["refs: pack it", "Say hello."]
    return [
        Prediction(id=at, user=f"u{at // 2}", prompt="", target=targets[at // 2 % 2], prediction=answer, history=9)
        for at in range(2 * users)
    ]


def results(**more: Any) -> dict[str, Any]:
    """The population answers all alike, the users' models as each user does."""
    own = [Prediction(**{**row_of(row), "prediction": row.target}) for row in rows("")]
    predictions = {
        seed: {"population": rows("refs: pack it"), "groups": rows("refs: pack"), "users": own} for seed in (0, 1)
    }
    found = RawResults(predictions=predictions, task=TITLES, run={}, seconds={}, **more)
    return build_results(found, Effort(200, 200))


def row_of(row: Prediction) -> dict[str, Any]:
    return {name: getattr(row, name) for name in Prediction.__slots__}


def test_results_hold_style_with_intervals_and_paired_tests() -> None:
    history = {f"u{at}": habits_of(["refs: pack it"] if at % 2 == 0 else ["Say hello."]) for at in range(6)}
    found = results(habits=history)
    values = {(row["method"], row["metric"]): row for row in found["metrics"]}
    assert {name for _, name in values} == {"rouge1", "rougeL", *STYLE_METRICS, *STYLE_DISTANCES}
    assert values["users", "style_match"]["value"] == 1 and not values["users", "style_match"]["primary"]
    # Half of the users write neither the prefix nor the case nor the mark of the only answer, but two words for three.
    assert values["population", "style_match"]["value"] == pytest.approx((1 + (2 / 3) / 4) / 2)
    assert values["population", "style_prefix"]["ci95"][0] < 0.5 < values["population", "style_prefix"]["ci95"][1]
    assert values["users", "style_distance"]["value"] == 0
    assert values["population", "style_distance"]["value"] == pytest.approx(0.5)
    assert values["population", "style_length_gap"]["value"] == pytest.approx(0.5)
    assert not values["population", "style_distance"]["higher_is_better"]
    tested = [row for row in found["comparisons"] if row["metric"] == "style_distance"]
    assert {row["family"] for row in tested} == {"style"}
    (last,) = [row for row in tested if (row["method"], row["against"]) == ("users", "population")]
    assert last["difference"] == pytest.approx(-0.5) and last["relative"] > 0 and last["p_value"] < 0.3


def test_without_histories_there_are_matches_only() -> None:
    found = results()
    assert not {row["metric"] for row in found["metrics"]} & {*STYLE_DISTANCES}
    with pytest.raises(DataError, match="a distance of styles is defined on all answers of a user"):
        score("style_distance", rows("x"), TITLES)


def test_users_without_a_history_are_left_out_of_the_distances_alone() -> None:
    history = {f"u{at}": habits_of(["refs: pack it"] if at % 2 == 0 else ["Say hello."]) for at in range(5)}
    sizes = {(row["metric"], row["users"]) for row in results(habits=history)["metrics"]}
    assert sizes == {(name, 6) for name in ("rouge1", "rougeL", *STYLE_METRICS)} | {
        (name, 5) for name in STYLE_DISTANCES
    }
    found = results(habits={"u0": history["u0"]}, query_slices={"last": {10, 11}, "first": {0, 1}})
    named = {row["slice"] for row in found["slices"] if row["metric"] == "style_distance"}
    assert "first" in named and "last" not in named
