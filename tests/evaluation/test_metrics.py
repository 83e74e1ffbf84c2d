"""Metrics against worked examples with the traps of LaMP, and against the official definitions written out."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from rouge_score import rouge_scorer, scoring
from sklearn.metrics import f1_score

from proper.errors import DataError
from proper.evaluation.metrics import (
    METRICS,
    TASK_METRICS,
    TaskInfo,
    item_values,
    primary_metric,
    score,
)
from proper.evaluation.rouge import rouge_official
from proper.evaluation.scoring import require_ids

CITE = TaskInfo("lamp-1", "classification", ("[1]", "[2]"))
NEWS = TaskInfo("lamp-2n", "classification", ("crime", "food & drink", "politics"))
STARS = TaskInfo("lamp-3", "rating", ("1", "2", "3", "4", "5"))
TITLE = TaskInfo("lamp-4", "generation", official=True)


def test_a_classification_worked_out_by_hand(make):
    rows = make(
        [
            ("a", "politics", " politics\n"),  # surrounding space is stripped
            ("a", "crime", "Crime"),  # case is not
            ("b", "food & drink", "food and drink"),
            ("b", "crime", "crime"),
        ]
    )
    assert item_values("accuracy", rows, NEWS).tolist() == [1, 0, 0, 1]
    assert score("accuracy", rows, NEWS) == 0.5
    # crime: one hit of two golds and one prediction, 2/3; food & drink: 0; politics: 1.
    assert score("f1_macro", rows, NEWS) == pytest.approx((2 / 3 + 0 + 1) / 3)


def test_a_label_that_nobody_has_counts_as_zero_in_macro_f1(make):
    rows = make([("a", "crime", "crime"), ("a", "politics", "politics")])
    assert score("f1_macro", rows, NEWS) == pytest.approx(2 / 3)


def test_a_label_is_also_hit_by_its_number_in_another_spelling(make):
    rows = make([("a", "3", "3.0\n"), ("a", "2", "2"), ("a", "3", "3.5"), ("a", "2", "02"), ("a", "x", "3.0")])
    for labels in (("2", "3", "x"), ("2.0", "3.0", "x")):
        assert item_values("accuracy", rows, TaskInfo("own", "classification", labels)).tolist() == [1, 1, 0, 0, 0]
    accented = make([("a", "caf\u00e9", "cafe\u0301"), ("a", "cafe", "caf\u00e9")])
    assert item_values("accuracy", accented, TaskInfo("own", "classification", ("caf\u00e9", "cafe"))).tolist() == [
        1,
        0,
    ]
    # Where a run's list has both, the letters decide.
    assert score("accuracy", rows[:1], TaskInfo("own", "classification", ("3", "3.0"))) == 0


def test_a_citation_needs_its_opening_bracket(make):
    rows = make([("a", "[1]", "[1]"), ("a", "[1]", "1]"), ("b", "[2]", "[2"), ("b", "[2]", "[2] ")])
    assert item_values("accuracy", rows, CITE).tolist() == [1, 0, 0, 1]


def test_two_answers_outside_the_list_are_not_a_hit(make):
    assert score("accuracy", make([("a", "sports", "sports")]), NEWS) == 0


def test_an_unreadable_rating_is_the_end_farther_from_the_gold(make):
    golds = ["1", "2", "3", "4", "5"]
    rows = make([("a", gold, "great film!") for gold in golds])
    assert item_values("mae", rows, STARS).tolist() == [4, 3, 2, 3, 4]
    assert item_values("mae", make([("a", "3", "")]), STARS).tolist() == [2]
    signed = [5 - 1, 5 - 2, 5 - 3, 1 - 4, 1 - 5]
    assert item_values("rmse", rows, STARS).tolist() == [error**2 for error in signed]


def test_a_rating_is_whatever_float_reads(make):
    rows = make(
        [("a", "4", " 4.0\n"), ("a", "4", "4 stars"), ("a", "2", "-1"), ("a", "5", "nan"), ("a", "2", "9" * 200)]
    )
    assert item_values("mae", rows, STARS).tolist() == [0, 3, 3, 4, 3]


def test_another_scale_has_other_ends(make):
    halves = TaskInfo("films", "rating", ("0.5", "2", "3.5", "10"))
    assert halves.scale == (0.5, 10)
    assert item_values("mae", make([("a", "2", "?"), ("a", "8", "?")]), halves).tolist() == [8, 7.5]


def test_rmse_is_the_root_of_the_mean_square(make):
    rows = make([("a", "1", "4"), ("a", "2", "2"), ("b", "3", "3"), ("b", "5", "5")])
    assert score("mae", rows, STARS) == 0.75
    assert score("rmse", rows, STARS) == 1.5


def test_a_gold_with_a_colon_counts_as_a_whole(make):
    gold = "Attention: is all you need"
    rows = make([("a", gold, "Attention"), ("a", gold, gold)])
    # one word of five: precision 1, recall 1/5
    assert item_values("rouge1", rows, TITLE) == pytest.approx([2 * 1 * 0.2 / 1.2, 1])


def test_rouge_worked_out_by_hand(make):
    rows = make([("a", "the cat sat down", "cat the sat"), ("a", "running", "runs"), ("a", "x", "")])
    assert item_values("rouge1", rows, TITLE) == pytest.approx([6 / 7, 0, 0])  # no stemmer: running is not runs
    assert item_values("rougeL", rows, TITLE) == pytest.approx([4 / 7, 0, 0])


@given(st.lists(st.tuples(*[st.text("ab c:-é🙂", max_size=30)] * 2), min_size=1, max_size=8))
def test_rouge_agrees_with_the_library(make, texts):
    rows = make([("a", gold, answer) for gold, answer in texts])
    scorer = rouge_scorer.RougeScorer(["rouge1", "rougeL"], use_stemmer=False)
    for name in ("rouge1", "rougeL"):
        wanted = [scorer.score(gold, answer)[name].fmeasure for gold, answer in texts]
        assert item_values(name, rows, TITLE) == pytest.approx(wanted, abs=1e-9)
        assert score(name, rows, TITLE) == pytest.approx(float(np.mean(wanted)), abs=1e-9)


def test_the_official_rouge_number_is_the_aggregators(make):
    texts = [(f"one two {word}", f"{word} two three") for word in ("a", "b", "one", "four five")]
    rows = make([("a", gold, answer) for gold, answer in texts])
    scorer = rouge_scorer.RougeScorer(["rouge1"], use_stemmer=False)
    aggregator = scoring.BootstrapAggregator()
    for gold, answer in texts:
        aggregator.add_scores(scorer.score(gold, answer))
    np.random.seed(3)
    wanted = aggregator.aggregate()["rouge1"].mid.fmeasure
    assert rouge_official(item_values("rouge1", rows, TITLE), seed=3) == pytest.approx(wanted, abs=1e-12)


@given(
    st.lists(st.tuples(*[st.sampled_from(["crime", "politics", "food & drink", " crime", "other"])] * 2), min_size=1)
)
def test_classification_agrees_with_the_official_script(make, pairs):
    def index(text: str) -> int:
        return NEWS.labels.index(text.strip()) if text.strip() in NEWS.labels else -1

    pairs = [(gold, answer) for gold, answer in pairs if gold != "other"]  # official golds are in the list
    if not pairs:
        return
    rows = make([("a", gold, answer) for gold, answer in pairs])
    golds, answers = [index(gold) for gold, _ in pairs], [index(answer) for _, answer in pairs]
    assert score("accuracy", rows, NEWS) == pytest.approx(np.mean(np.equal(golds, answers)))
    wanted = f1_score(golds, answers, labels=[0, 1, 2], average="macro", zero_division=0)
    assert score("f1_macro", rows, NEWS) == pytest.approx(wanted)


@given(st.lists(st.tuples(st.sampled_from("12345"), st.sampled_from(["1", "4.5", "x", "", " 2 ", "1e0"])), min_size=1))
def test_ratings_agree_with_the_official_script(make, pairs):
    def official(answer: str, gold: float) -> float:
        try:
            return float(answer)
        except ValueError:
            return 1.0 if abs(1 - gold) > abs(5 - gold) else 5.0

    errors = [official(answer, float(gold)) - float(gold) for gold, answer in pairs]
    rows = make([("a", gold, answer) for gold, answer in pairs])
    assert score("mae", rows, STARS) == pytest.approx(np.mean(np.abs(errors)))
    assert score("rmse", rows, STARS) == pytest.approx(math.sqrt(np.mean(np.square(errors))))


def test_loss_is_read_off_the_predictions(make):
    rows = [replace(row, loss=loss) for row, loss in zip(make([("a", "x", "x")] * 2), (1.0, 2.0), strict=True)]
    assert score("loss", rows, TITLE) == 1.5
    assert math.isnan(score("loss", make([("a", "x", "x")]), TITLE))


def test_the_registry_knows_which_way_is_better():
    assert {name for name, metric in METRICS.items() if not metric.higher_is_better} == {
        *("mae", "rmse", "loss", "label_loss", "style_distance", "style_length_gap")
    }
    assert [TASK_METRICS[kind][0] for kind in ("classification", "rating", "generation")] == [
        primary_metric(NEWS),
        primary_metric(STARS),
        primary_metric(TITLE),
    ]


@pytest.mark.parametrize(
    ("found", "says"),
    [
        ([1, 2], "1 queries are not answered, the first is 3"),
        ([1, 2, 3, 9], "1 ids are no queries, the first is 9"),
        ([1, 2, 3, 2], "query 2 is answered twice"),
    ],
)
def test_predictions_must_cover_exactly_the_gold_ids(make, found, says):
    row = make([("a", "x", "x")])[0]
    require_ids("groups", [replace(row, id=id_) for id_ in (3, 1, 2)], [1, 2, 3])
    with pytest.raises(DataError, match=f"predictions of groups: {says}"):
        require_ids("groups", [replace(row, id=id_) for id_ in found], [1, 2, 3])


@pytest.mark.parametrize(
    ("name", "task", "says"),
    [
        ("bleu", TITLE, "metric 'bleu' is not known"),
        ("f1_macro", NEWS, "defined on a set"),
        ("accuracy", TaskInfo("t", "classification"), "needs its labels"),
        ("mae", TaskInfo("t", "rating"), "needs its labels"),
        ("mae", TaskInfo("t", "rating", ("1", "good")), "'good' is not a number"),
        ("mae", STARS, "query 0 of user a: the gold rating 'x' is not a number"),
    ],
)
def test_what_cannot_be_scored_is_one_clear_line(make, name, task, says):
    with pytest.raises(DataError, match=says):
        item_values(name, make([("a", "x", "x")]), task)


def test_nothing_cannot_be_scored():
    with pytest.raises(DataError, match="no predictions"):
        score("rouge1", [], TITLE)
