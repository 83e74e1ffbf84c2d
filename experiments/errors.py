"""Which error remains on a task with labels: variance between trainings, labels of similar items, and the rest.

    python -m experiments.errors RUN RUN [RUN...] --out FILE.json

RUN is a run folder, or a seed's folder, with the predictions of the same queries: the runs differ in seed or budget.

    variance   accuracy of the mean of the runs' label probabilities, against the mean accuracy of the runs
    shared     queries that every run and method answers wrongly, and how many have the true label in second place
    labels     share of pairs of one user's history items that have different labels, by cosine of their TF-IDF vectors

Two items with the same text have different labels with probability d = 1 - sum p(y)^2 <= 2 e - e^2, where
e = 1 - max p(y) is the error of the best answer. So d of the most similar pairs gives an estimate of the noise of the
labels there: e is at least 1 - sqrt(1 - d), and at most d, since max p(y) >= sum p(y)^2. Similar items are not the
same, which makes d too large; queries that resemble nothing can be noisier.
"""

from __future__ import annotations

import argparse
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
from sklearn.feature_extraction.text import TfidfVectorizer

from proper.data.dataset import Dataset
from proper.errors import ProperError
from proper.evaluation.metrics import Prediction, TaskInfo
from proper.evaluation.runner import read_predictions
from proper.evaluation.statistics import compare, estimate, user_scores
from proper.files import write_json
from proper.methods.prior import Floats, probabilities
from proper.run_folder import RunFolder

METHODS = ("users", "head+prior")
BINS = (0.2, 0.3, 0.4, 0.5, 1.01)
"""Limits of the cosine of two items of one user."""
SHOWN = 5

Runs = Sequence[Sequence[Prediction]]
"""Predictions of one method by run, of the same queries in the same order."""


@dataclass(frozen=True)
class Answers:
    """Predictions by method and run, and the labels in the order of their scores."""

    by_method: Mapping[str, Runs]
    labels: Sequence[str]
    task: TaskInfo


def read(folders: Sequence[Path]) -> Answers:
    """Return the predictions of the methods that every run has.

    Raises:
        ValueError: the runs have different queries or labels, no method in common, or predictions without scores.
    """
    sets = [_labels(folder) for folder in folders]
    there = [method for method in METHODS if all(RunFolder(f).predictions_of(method).exists() for f in folders)]
    if not there or any(labels != sets[0] for labels in sets):
        raise ValueError("the runs have different labels, or no method in common")
    found = {method: [_predictions(folder, method) for folder in folders] for method in there}
    asked = [[(row.user, row.prompt, row.target) for row in run] for runs in found.values() for run in runs]
    if any(rows != asked[0] for rows in asked):
        raise ValueError("the runs have different queries")
    return Answers(found, sets[0], TaskInfo("errors", "classification", sets[0]))


def _labels(folder: Path) -> list[str]:
    with Dataset.open(RunFolder(folder).data) as dataset:
        return dataset.labels


def _predictions(folder: Path, method: str) -> list[Prediction]:
    found = read_predictions(RunFolder(folder).predictions_of(method), label_scores=True)
    if not all(row.label_scores for row in found):
        raise ValueError(f"{folder}: the predictions of {method} have no label scores; evaluate it again")
    # Runs of other budgets have other ids for the same queries.
    ordered = sorted(found, key=lambda row: (row.user, row.prompt, row.target))
    return [replace(row, id=at) for at, row in enumerate(ordered)]


def shares(run: Sequence[Prediction]) -> Floats:
    """Return the label probabilities of every query, `(N, L)`."""
    return probabilities([row.label_scores or [] for row in run])


def variance(runs: Runs, labels: Sequence[str], task: TaskInfo) -> dict[str, Any]:
    """Return the accuracy of the runs, that of the mean of their probabilities, and the paired difference."""
    mixed = np.mean([shares(run) for run in runs], axis=0).argmax(axis=1)
    together = [replace(row, prediction=labels[at]) for row, at in zip(runs[0], mixed, strict=True)]
    alone = user_scores("accuracy", runs, task)
    # The same answers for every run, so that both sides have as many.
    mean = user_scores("accuracy", [together] * len(runs), task)
    difference = compare(mean, alone)
    return {
        "accuracy": _figure(estimate(alone)),
        "by_run": alone.values().tolist(),
        "mean_of_runs": _figure(estimate(mean)),
        "difference": [difference.difference, difference.low, difference.high, difference.p_value],
    }


def _figure(found: Any) -> list[float]:
    return [found.value, found.low, found.high]


def shared(answers: Answers) -> dict[str, Any]:
    """Return the errors that all runs and methods share, and what the true label's place is there."""
    every = [run for runs in answers.by_method.values() for run in runs]
    wrong = np.all([[row.prediction != row.target for row in run] for run in every], axis=0)
    order = (-np.mean([shares(run) for run in every], axis=0)).argsort(axis=1)
    at = {label: index for index, label in enumerate(answers.labels)}
    second = [order[i, 1] == at.get(row.target) for i, row in enumerate(every[0]) if wrong[i]]
    # The answer of all runs together: single runs can be wrong in different ways.
    pairs = Counter((row.target, answers.labels[order[i, 0]]) for i, row in enumerate(every[0]) if wrong[i])
    return {
        "queries": len(wrong),
        "wrong_in_all": int(wrong.sum()),
        "of_these_second": int(sum(second)),
        "most_frequent": [[*pair, count] for pair, count in pairs.most_common(SHOWN)],
    }


def similar_items(folder: Path) -> list[dict[str, Any]]:
    """Return how often two history items of one target user have different labels, by their similarity."""
    with Dataset.open(RunFolder(folder).data) as dataset:
        histories = [dataset.history(user.id) for user in dataset.users("target")]
    terms = TfidfVectorizer(sublinear_tf=True).fit([row.prompt for rows in histories for row in rows])
    pairs, differ = np.zeros(len(BINS) - 1, dtype=int), np.zeros(len(BINS) - 1, dtype=int)
    for rows in histories:
        vectors = terms.transform([row.prompt for row in rows])
        cosines = (vectors @ vectors.T).toarray()
        targets = np.asarray([row.target for row in rows])
        one, other = np.triu_indices(len(rows), 1)
        inside = np.digitize(cosines[one, other], BINS) - 1
        for place in range(len(pairs)):
            chosen = inside == place
            pairs[place] += chosen.sum()
            differ[place] += (targets[one] != targets[other])[chosen].sum()
    return [
        {"cosine": [low, min(high, 1.0)], "pairs": int(count), "different": int(number)}
        for (low, high), count, number in zip(pairwise(BINS), pairs, differ, strict=True)
    ]


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", type=Path)
    parser.add_argument("--out", type=Path, required=True)
    given = parser.parse_args(arguments)
    try:
        answers = read(given.runs)
    except (ValueError, ProperError) as error:
        parser.error(str(error))
    methods = {name: variance(runs, answers.labels, answers.task) for name, runs in answers.by_method.items()}
    found = {"runs": len(given.runs), "methods": methods, **shared(answers), "items": similar_items(given.runs[0])}
    write_json(given.out, found)


if __name__ == "__main__":
    main()
