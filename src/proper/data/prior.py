"""User prior: the distribution of a user's answers, known from the user's earlier answers alone (method: user prior).

    pi_u(y) = [sum_i g^(n-i) 1(y_i = y) + a pi(y)] / [sum_i g^(n-i) + a]

y_1 .. y_n are a user's answers, oldest first, g is the decay, a the smoothing, and pi the distribution of all users'
answers. g and a are the values of a grid with the lowest mean -log pi_u(y) on the users' held-out items, each predicted
from the items before the held-out part. No query is read. Shapes: N answers, L labels.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from proper.data.dataset import Dataset
from proper.data.encoder import HistoryRow
from proper.data.histories import TextExample
from proper.data.values import find_label

Floats = NDArray[np.float64]
Integers = NDArray[np.int64]

DECAYS = (0.7, 0.8, 0.9, 0.95, 0.98, 1.0)
SMOOTHINGS = (0.25, 0.5, 1.0, 2.0, 4.0, 8.0, 16.0, 32.0)


def user_prior(answers: Integers, population: Floats, decay: float, smoothing: float) -> Floats:
    """Return pi_u, `(L,)`, from label indices `answers` (N,), oldest first, and pi `population` (L,)."""
    weights = decay ** np.arange(len(answers) - 1, -1, -1, dtype=np.float64)
    counts = np.bincount(answers, weights, len(population))
    return np.asarray((counts + smoothing * population) / (weights.sum() + smoothing))


def earlier_priors(answers: Integers, population: Floats, decay: float, smoothing: float) -> Floats:
    """Return for every item the prior from the items before it, `(N, L)`, as for a query at its place.

    A prior from all other items would reveal the answer that it leaves out.
    """
    counts, total = np.zeros(len(population)), 0.0
    found = np.empty((len(answers), len(population)))
    for at, answer in enumerate(answers):
        found[at] = (counts + smoothing * population) / (total + smoothing)
        counts, total = decay * counts, decay * total + 1
        counts[answer] += 1
    return found


def choose(histories: Sequence[tuple[Integers, Integers]], population: Floats) -> tuple[float, float]:
    """Return the decay and smoothing of the grid with the lowest mean -log pi_u of the held-out answers; 1, 1 if none.

    Args:
        histories: each user's older answers and held-out answers, as label indices.
        population: pi, `(L,)`, positive.
    """
    best, found = np.inf, (1.0, 1.0)
    if not histories:
        return found
    smoothings = np.asarray(SMOOTHINGS)[:, None]
    for decay in DECAYS:
        losses = np.zeros(len(SMOOTHINGS))
        for older, held in histories:
            weights = decay ** np.arange(len(older) - 1, -1, -1, dtype=np.float64)
            counts = np.bincount(older, weights, len(population))[held]
            shares = (counts + smoothings * population[held]) / (weights.sum() + smoothings)
            losses -= np.log(shares).sum(1)
        at = int(losses.argmin())
        if losses[at] < best - 1e-12:
            best, found = float(losses[at]), (decay, SMOOTHINGS[at])
    return found


def label_numbers(labels: Sequence[str], kind: str) -> Callable[[str], int]:
    """Return a function from an answer to the index of its label, -1 for an answer that is no label."""
    index = {label: at for at, label in enumerate(labels)}
    known: dict[str, int] = {}

    def number(answer: str) -> int:
        if answer not in known:
            label = find_label(answer, labels, kind)
            known[answer] = -1 if label is None else index[label]
        return known[answer]

    return number


@dataclass(frozen=True)
class UserPriors:
    """The priors of a dataset's target users.

    Attributes:
        labels: the L labels.
        answers: each target user's answers in the history as label indices, oldest first; other answers are left out.
        held: how many of a user's newest answers are held out.
        population: pi over all users' histories, smoothed by one more answer of each label, `(L,)`.
        population_before: pi without the held-out answers.
    """

    labels: Sequence[str]
    answers: Mapping[str, Integers]
    held: Mapping[str, int]
    population: Floats
    population_before: Floats
    decay: float = field(init=False)
    smoothing: float = field(init=False)

    def __post_init__(self) -> None:
        parts = [self.parts(user) for user in self.answers]
        decay, smoothing = choose([part for part in parts if len(part[1])], self.population_before)
        object.__setattr__(self, "decay", decay)
        object.__setattr__(self, "smoothing", smoothing)

    @classmethod
    def of(cls, dataset: Dataset, kind: str, held_out: Callable[[int], int]) -> UserPriors:
        """Read the answers of a dataset.

        Args:
            dataset: the dataset; its queries are not read.
            kind: the task's kind, which says when two spellings are one label.
            held_out: function from the length of a history to the number of its newest items that are held out.
        """
        number = label_numbers(dataset.labels, kind)
        rows = dataset.connection.execute(
            """SELECT u.id, t.target FROM rows r CROSS JOIN users u ON u.number = r.user
            CROSS JOIN texts t ON t.id = r.text WHERE r.part = 'history' AND u.role = 'target' ORDER BY r.user, r.id"""
        )
        found = {
            user: np.asarray([at for _, target in group if (at := number(target)) >= 0], dtype=np.int64)
            for user, group in itertools.groupby(rows, key=lambda row: str(row[0]))
        }
        held = {user: held_out(len(answers)) if len(answers) > 1 else 0 for user, answers in found.items()}
        counts = np.ones(len(dataset.labels))
        for target, amount in dataset.connection.execute(
            """SELECT t.target, count(*) FROM rows r CROSS JOIN texts t ON t.id = r.text WHERE r.part = 'history'
            GROUP BY t.target"""
        ):
            if (at := number(target)) >= 0:
                counts[at] += amount
        before = counts.copy()
        for user, answers in found.items():
            np.subtract.at(before, answers[len(answers) - held[user] :], 1)
        return cls(dataset.labels, found, held, counts / counts.sum(), before / before.sum())

    def parts(self, user: str) -> tuple[Integers, Integers]:
        """Return a user's answers before the held-out ones, and the held-out ones."""
        answers = self.answers[user]
        cut = len(answers) - self.held[user]
        return answers[:cut], answers[cut:]

    def shares(self, user: str) -> Floats:
        """Return pi_u from the user's whole history, `(L,)`; pi for a user without a history."""
        if user not in self.answers:
            return self.population
        return user_prior(self.answers[user], self.population, self.decay, self.smoothing)

    def shares_before(self, user: str) -> Floats:
        """Return pi_u from the items before the held-out ones, `(L,)`."""
        return user_prior(self.parts(user)[0], self.population_before, self.decay, self.smoothing)


class EarlierPriors:
    """The priors of training rows: pi_u from the user's answers before a row, as `earlier_priors` computes them.

    Attributes:
        labels: the L labels.
        population: pi, `(L,)`.
    """

    def __init__(
        self,
        histories: Callable[[str], Sequence[TextExample]],
        labels: Sequence[str],
        kind: str,
        population: Floats,
        decay: float,
        smoothing: float,
    ) -> None:
        self.labels, self.population = labels, population
        self._histories, self._number = histories, label_numbers(labels, kind)
        self._settings = population, decay, smoothing
        self._of = lru_cache(maxsize=1024)(self._of_user)

    def before(self, example: HistoryRow) -> tuple[int, Floats]:
        """Return the index of a history row's answer, -1 if it is no label, and pi_u of the rows before it, `(L,)`."""
        places, priors = self._of(example.user)
        return self._number(example.target), priors[places[example.id]]

    def _of_user(self, user: str) -> tuple[dict[int, int], Floats]:
        """Return the number of labelled rows before each row, and the prior for each such number, `(N + 1, L)`."""
        places: dict[int, int] = {}
        answers: list[int] = []
        for row in self._histories(user):
            places[row.id] = len(answers)
            if (at := self._number(row.target)) >= 0:
                answers.append(at)
        known = np.asarray([*answers, 0], dtype=np.int64)
        return places, earlier_priors(known, *self._settings)
