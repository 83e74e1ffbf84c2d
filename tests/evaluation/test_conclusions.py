"""The claim of personalization, and each failure signature: there when it should be, with its numbers, else silent."""

from __future__ import annotations

from typing import Any

import pytest

from proper.evaluation.comparisons import CONTROLS
from proper.evaluation.conclusions import against_trivial, claim, failure_signatures, one_answer


def control(pair, difference=0.1, p=0.01, higher=True, primary=True):
    return {
        "method": pair[0], "against": pair[1], "difference": difference, "p_adjusted": p, "primary": primary,
        "higher_is_better": higher, "family": "trivial",
    }  # fmt: skip


def test_all_controls_beaten_is_a_claim():
    assert claim([control(pair) for pair in CONTROLS])["claimed"] is True
    assert claim([control(pair, -0.1, higher=False) for pair in CONTROLS])["claimed"] is True


@pytest.mark.parametrize("bad", [{"p": 0.05}, {"difference": -0.1}, {"difference": 0.1, "higher": False}])
@pytest.mark.parametrize("at", range(4))
def test_one_control_not_beaten_is_none(at, bad):
    rows = [control(pair, **(bad if place == at else {})) for place, pair in enumerate(CONTROLS)]
    found = claim(rows)
    assert found["claimed"] is False and found["not_beaten"] == [" > ".join(CONTROLS[at])]


def test_what_was_not_run_is_said():
    found = claim([control(CONTROLS[0])])
    assert found["claimed"] is None and found["missing"] == ["groups-shared-e", "swapped", "shuffled"]
    assert claim([control(("users", "rag")), control(CONTROLS[0], primary=False)]) is None


def metric(method: str, value: float, higher: bool = True, users: int = 20) -> dict[str, Any]:
    shared = {"metric": "m", "higher_is_better": higher, "primary": True, "users": users}
    return {"method": method, "value": value, **shared}


def measured(population: float, users: float, constant: float, own: float, p: float = 0.01, higher=True, n: int = 20):
    """The `trivial` of a run with these values, where every comparison has this p-value."""
    values = {"population": population, "users": users, "global-majority": constant, "user-majority": own}
    pairs = [("population", "global-majority"), ("users", "global-majority"), ("users", "user-majority")]
    rows = [control(pair, values[pair[0]] - values[pair[1]], p, higher) for pair in pairs]
    return against_trivial([metric(name, value, higher, n) for name, value in values.items()], rows)


@pytest.mark.parametrize("sign", [1, -1])
def test_what_trivial_rows_say(sign):
    def said(*values: float, p: float = 0.01):
        return measured(*(sign * value for value in values), p=p, higher=sign > 0)

    well = said(0.5, 0.8, 0.3, 0.6)
    assert (well["stage"], well["best"], well["undertrained"]) == ("users", "user-majority", False)
    assert well["beaten"] == ["global-majority", "user-majority"] and not well["sentences"]
    lost = said(0.5, 0.6, 0.3, 0.7)
    assert lost["wins"] == ["user-majority"] and lost["beaten"] == ["global-majority"]
    assert [line[:50] for line in lost["sentences"]] == ["Trivial rows, without a model, are better than use"]
    flat = said(0.3, 0.8, 0.3, 0.6)
    assert flat["undertrained"] is True and flat["sentences"][0].startswith("Population is undertrained")
    few = said(0.5, 0.8, 0.3, 0.6, p=0.2)
    assert few["unclear"] == ["global-majority", "user-majority"] and few["undertrained"] is False
    assert few["sentences"][0].startswith("Population is not measurably better")
    assert few["sentences"][1].startswith("Not measurably worse than users")


def test_too_few_users_for_any_significant_difference_are_said_to_be(n=6):
    few = measured(0.5, 0.8, 0.3, 0.6, p=0.1, n=n)
    assert few["sentences"] == [
        "6 target users are too few for a significant difference (p < .05, adjusted) between users (m 0.8000) "
        "and these trivial rows: global-majority (0.3000), user-majority (0.6000)."
    ]
    assert "measurably" in measured(0.5, 0.8, 0.3, 0.6, p=0.1, n=n + 1)["sentences"][0]
    assert measured(0.5, 0.8, 0.3, 0.6, p=1.0, n=1)["sentences"][-1].startswith("1 target user is too few")


@pytest.mark.parametrize(("best", "worse", "higher"), [(1.0, 0.9, True), (0.0, 0.3, False)])
def test_a_population_that_is_always_right_as_the_constant_is_is_not_undertrained(best, worse, higher):
    same = measured(best, best, best, best, p=1.0, higher=higher)
    assert same["undertrained"] is False and "cannot show a gain" in same["sentences"][0]
    assert measured(worse, best, best, best, higher=higher)["undertrained"] is True


def test_no_gain_over_an_undertrained_population_is_claimed():
    every = [control(pair) for pair in CONTROLS]
    assert claim(every, measured(0.3, 0.8, 0.3, 0.6))["claimed"] is False
    assert claim(every, measured(0.5, 0.8, 0.3, 0.6))["claimed"] is True


@pytest.mark.parametrize(
    ("answers", "golds", "says"),
    [("a" * 19 + "b", "abcd" * 5, True), ("abcd" * 5, "abcd" * 5, False), ("a" * 20, "a" * 19 + "b", False)],
)
def test_one_label_for_most_queries(make, answers, golds, says):
    rows = make([("u", gold, answer) for gold, answer in zip(golds, answers, strict=True)])
    found = one_answer(rows, ["a", "b", "c", "d"])
    assert bool(found) == says and not one_answer(rows, [])
    if says:
        assert found[0].startswith(
            "Population answers 'a' to 19 of 20 queries, and the most frequent label is right for 5"
        )


def test_no_trivial_rows_no_word_of_them():
    assert against_trivial([metric("users", 0.5)], []) is None
    assert against_trivial([metric("prior", 0.5)], []) is None


def row(**changes: Any) -> dict[str, Any]:
    """Return a step that is a measurable gain."""
    return {
        "method": "groups", "against": "population", "metric": "accuracy", "family": "primary", "difference": 0.05,
        "p_adjusted": 0.01, "higher_is_better": True, "resolvable": 0.03, **changes,
    }  # fmt: skip


def gain(history: int, users: float | None) -> dict[str, Any]:
    return {"user": f"u{history}", "history": history, "gain_groups": 0.0, "gain_users": users}


def found(**changes: Any) -> list[str]:
    healthy = {
        "routing": {"utilization": [0.5, 0.3, 0.2], "constraint_cosine": 0.6},
        "comparisons": [row()],
        "gains": [gain(10, 0.1), gain(20, 0.0)],
        "query_losses": {"u10": 1.0, "u20": 1.2},
        "history_losses": {"u10": 0.9, "u20": 1.1},
    }
    return failure_signatures(**{**healthy, **changes})


def test_a_healthy_run_has_none_and_neither_has_an_empty_one():
    assert found() == []
    assert found(routing={}, comparisons=[], gains=[], query_losses={}, history_losses={}) == []


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        (
            {"p_adjusted": 1.0, "difference": 0.0, "resolvable": 0.0},
            "No gain from groups against population: every user's accuracy is the same with both.",
        ),
        ({"p_adjusted": 0.2}, "No measurable gain from groups against population (accuracy +0.0500, adjusted p = 0.2"),
        ({"p_adjusted": 0.2}, "80 % power is about 0.0300."),
        ({"difference": -0.05}, "A measurable loss from groups against population"),
        ({"higher_is_better": False}, "A measurable loss"),
    ],
)
def test_a_step_that_shows_nothing_or_harm(changes, says):
    assert len(found(comparisons=[row(**changes)])) == 1
    assert says in found(comparisons=[row(**changes)])[0]


def test_a_step_whose_power_is_unknown_says_nothing_about_it():
    assert found(comparisons=[row(p_adjusted=1.0, resolvable=float("nan"))])[0].endswith("adjusted p = 1.000).")


def test_only_the_primary_family_speaks():
    assert found(comparisons=[row(family="other", p_adjusted=0.9)]) == []


def test_users_for_whom_stage_3_is_worse_are_counted_by_history():
    gains = [gain(4, -0.2), gain(5, -0.1), gain(6, 0.0), gain(30, -0.1), gain(40, 0.2), gain(50, 0.1), gain(60, None)]
    (said,) = found(gains=gains)
    assert "worse than stage 2 for 3 of 6 users and better for 2" in said
    assert "2 of the 3 users with 4 to 6 interactions and for 1 of the 3 users with 30 to 50 interactions" in said
    (said,) = found(gains=[gain(9, -0.1), gain(9, 0.1)])
    assert "interactions" not in said


def test_overlapping_and_unused_experts():
    (said,) = found(routing={"utilization": [0.5, 0.5], "constraint_cosine": 0.97})
    assert "overlap" in said and "0.970" in said
    (said,) = found(routing={"utilization": [0.6, 0.39, 0.01], "constraint_cosine": 0.5})
    assert said.startswith("1 of 3 experts is almost unused (2)")
    assert found(routing={"utilization": [1.0], "constraint_cosine": 1.0}) == []


def test_a_gap_between_query_and_history_loss():
    (said,) = found(query_losses={"u10": 2.0, "u20": 2.0, "only": 9.0}, history_losses={"u10": 0.5, "u20": 1.5})
    assert "2.000 nats per token on queries and 1.000" in said and "for 1 of 2 users" in said
