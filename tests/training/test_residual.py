"""Training rows of the residual form: what each knows of the user's habit, and the sample of many labels."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import pytest
import torch

from proper.data.encoder import Encoder
from proper.data.histories import TextExample
from proper.data.prior import EarlierPriors
from proper.training.residual import ResidualEncoder, habit

LABELS = ["red", "green", "blue"]
POPULATION = np.asarray([0.5, 0.3, 0.2])


def history(answers: Sequence[str]) -> list[TextExample]:
    return [TextExample(100 + at, "ann", f"item {at} is", each, None, None, 9) for at, each in enumerate(answers)]


def coder(encoder: Encoder, rows: list[TextExample], labels: list[str] = LABELS, most: int = 32) -> ResidualEncoder:
    population = POPULATION if labels == LABELS else np.full(len(labels), 1 / len(labels))
    priors = EarlierPriors(lambda user: rows, labels, "classification", population, 0.9, 2.0)
    return ResidualEncoder(encoder, priors, 0, most)


def slow_ratio(before: Sequence[str], label: int) -> float:
    weights = [0.9 ** (len(before) - 1 - at) for at in range(len(before))]
    own = sum(weight for weight, answer in zip(weights, before, strict=True) if answer == LABELS[label])
    return float((own + 2.0 * POPULATION[label]) / (sum(weights) + 2.0) / POPULATION[label])


def test_a_row_knows_only_the_answers_before_it(encoder: Encoder) -> None:
    """A change of the row's own answer, or of a later one, changes nothing of its prior."""
    answers = ["red", "blue", "blue", "green", "red"]
    rows = history(answers)
    coded = [coder(encoder, rows).encode(row) for row in rows]
    for at, row in enumerate(coded):
        assert row.choice is not None
        known = answers[:at]
        assert row.choice.prior.exp().tolist() == pytest.approx([slow_ratio(known, y) for y in range(3)], rel=1e-5)
        assert row.choice.answer == LABELS.index(answers[at])
        changed = history([*answers[:at], *("green" for _ in answers[at:])])
        other = coder(encoder, changed).encode(changed[at]).choice
        assert other is not None and torch.equal(other.prior, row.choice.prior)


def test_a_row_is_its_prompt_and_the_tree_of_all_labels(encoder: Encoder) -> None:
    rows = history(["red"])
    row = coder(encoder, rows).encode(rows[0])
    assert row.ids[: row.start] == encoder.prompt(rows[0].prompt) and row.choice is not None
    assert row.ids[row.start :] == tuple(row.choice.tree.tokens.tolist())
    sizes = row.choice.tree.member.sum(0).tolist()
    assert sizes == [len(encoder.answer(label)) for label in LABELS]


def test_an_answer_that_is_no_label_joins_them(encoder: Encoder) -> None:
    rows = history(["red", "something else", "red"])
    coding = coder(encoder, rows)
    choice = coding.encode(rows[1]).choice
    assert choice is not None and choice.answer == 3 and choice.tree.member.shape[1] == 4
    after = coding.encode(rows[2]).choice
    assert after is not None and after.prior.exp().tolist() == pytest.approx([slow_ratio(["red"], y) for y in range(3)])


def test_many_labels_are_sampled_without_bias(encoder: Encoder) -> None:
    """Over many items, the mean of the sampled sum is the sum over all labels."""
    labels = [f"label{at}" for at in range(12)]
    rows = history([labels[at % 12] for at in range(3000)])
    coding, scores = coder(encoder, rows, labels, most=4), torch.linspace(-2, 2, 12)
    found = []
    for row in rows:
        choice = coding.encode(row).choice
        assert choice is not None and len(choice.prior) == 4
        own = coding._candidates(row, labels.index(row.target))
        assert own[choice.answer] == labels.index(row.target)
        plain = torch.from_numpy(habit(coding.priors.before(row)[1], coding.priors.population))
        whole = float((scores + plain).exp().sum())
        found.append(float((scores[own] + choice.prior).exp().sum()) / whole)
    error = torch.tensor(found).std().item() / math.sqrt(len(found))
    assert abs(sum(found) / len(found) - 1) < 4 * error < 0.1
