"""Metrics (accuracy, macro-F1, MAE, RMSE, ROUGE, style, answer loss), computed as in the official LaMP script.

A metric consists of two functions: the *contributions* of each query (a row of numbers), and the value of a *sum* of
contributions. Sums are additive over users, so a resample of users is a matrix product, for F1 and RMSE too.

Shapes: N queries, L labels, F numbers that a query contributes (1, or 3 L for F1).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from proper.data.values import label_key
from proper.data.words import latin_words, words
from proper.errors import DataError
from proper.evaluation import style
from proper.evaluation.rouge import rouge_1, rouge_l

FloatArray = NDArray[np.float64]
TaskKind = Literal["classification", "rating", "generation"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Prediction:
    """One query answered by one method.

    `loss` is the mean answer loss in nats per token, `label_loss` -log p(target) in nats with p normalized over the
    labels (so it compares methods with and without a model), `label_scores` each label's log-likelihood in nats (kept
    in files, not in memory), `tier` the serving tier, `history` the number of the user's earlier interactions, `task`
    the name of its task in a run of several.
    """

    id: int
    user: str
    prompt: str
    target: str
    prediction: str
    item: str | None = None
    loss: float | None = None
    label_loss: float | None = None
    label_scores: list[float] | None = None
    tokens: int = 0
    tier: str = ""
    history: int = 0
    task: str = ""


@dataclass(frozen=True, slots=True)
class TaskInfo:
    """The task: a name for tables, the kind, and the fixed label list (empty for generation).

    With `official`, ROUGE uses the tokenization of the benchmark's scorer, which keeps only ASCII words.
    """

    name: str
    kind: TaskKind
    labels: Sequence[str] = ()
    official: bool = False

    @property
    def scale(self) -> tuple[float, float]:
        """The lowest and the highest rating.

        Raises:
            DataError: there are no labels, or one is not a number.
        """
        if not self.labels:
            raise DataError(f"task {self.name}: a rating task needs its labels, to know the scale")
        numbers = [_number(label) for label in self.labels]
        for label, number in zip(self.labels, numbers, strict=True):
            if number is None:
                raise DataError(f"task {self.name}: the rating label {label!r} is not a number")
        finite = [number for number in numbers if number is not None]
        return min(finite), max(finite)


Contributions = Callable[[Sequence[Prediction], TaskInfo], FloatArray]
"""Function from predictions to what each query contributes, `(N, F)`."""
Finish = Callable[[FloatArray, FloatArray], FloatArray]
"""Function from sums of contributions `(..., F)` and numbers of queries `(...)` to values `(...)`."""


@dataclass(frozen=True, slots=True)
class Metric:
    """A metric over a set of queries.

    `contributions(predictions, task)` has shape `(N, F)`. `finish(sums (..., F), counts (...))` returns the values
    `(...)` of query sets with those sums; `finish_user` does the same for the queries of one user (only F1 differs, see
    `_f1_present`).
    """

    name: str
    higher_is_better: bool
    contributions: Contributions
    finish: Finish
    finish_user: Finish


def item_values(name: str, predictions: Sequence[Prediction], task: TaskInfo) -> FloatArray:
    """Return one number per query, `(N,)`: 0/1, absolute error, squared error (for rmse), ROUGE or loss.

    Raises:
        DataError: the metric is unknown, it has no value per query (f1_macro), or a gold is unusable.
    """
    metric = get_metric(name)
    if metric.finish is _f1_fixed:
        raise DataError(f"metric {name}: it is defined on a set of queries, not on one")
    return metric.contributions(predictions, task)[:, 0]


def score(name: str, predictions: Sequence[Prediction], task: TaskInfo) -> float:
    """Return the metric over all `predictions`, each query counting once.

    Raises:
        DataError: the metric is unknown, there are no predictions, or a gold is unusable.
    """
    if not predictions:
        raise DataError("no predictions to score")
    metric = get_metric(name)
    total = metric.contributions(predictions, task).sum(axis=0)
    return float(metric.finish(total, np.asarray(float(len(predictions)))))


def get_metric(name: str) -> Metric:
    """Return the metric called `name`.

    Raises:
        DataError: the metric is unknown.
    """
    if name not in METRICS:
        raise DataError(f"metric {name!r} is not known; known are {', '.join(METRICS)}")
    return METRICS[name]


def _label_indices(texts: Iterable[str], task: TaskInfo) -> NDArray[np.int64]:
    """Return each text's index in the fixed label list, matched stripped or by `label_key`; -1 for anything else."""
    indices = {label.strip(): index for index, label in enumerate(task.labels)}
    by_key = {label_key(label, task.kind): index for label, index in indices.items()}
    by_key[None] = -1
    found = (indices.get(text, by_key.get(label_key(text, task.kind), -1)) for text in map(str.strip, texts))
    return np.asarray([*found], dtype=np.int64)


def _found_and_gold(predictions: Sequence[Prediction], task: TaskInfo) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Return the labels' indices of the predictions and of the golds; -1 for a text that is no label."""
    if not task.labels:
        raise DataError(f"task {task.name}: a classification task needs its labels")
    found = _label_indices((row.prediction for row in predictions), task)
    return found, _label_indices((row.target for row in predictions), task)


def _accuracy(predictions: Sequence[Prediction], task: TaskInfo) -> FloatArray:
    found, golds = _found_and_gold(predictions, task)
    # A gold outside the list is wrong for every method; the official script would call -1 == -1 correct.
    return np.asarray((found == golds) & (golds >= 0), dtype=np.float64)[:, None]


def _confusions(predictions: Sequence[Prediction], task: TaskInfo) -> FloatArray:
    """Return `(N, 3 L)`: for each label, indicators of a true positive, of the gold and of the prediction."""
    found, golds = _found_and_gold(predictions, task)
    labels = np.arange(len(task.labels))
    predicted, gold = found[:, None] == labels, golds[:, None] == labels
    return np.concatenate([predicted & gold, gold, predicted], axis=1).astype(np.float64)


def _number(text: str) -> float | None:
    """Return `float(text)`; None if that fails or its square is not finite (the official script would return NaN)."""
    try:
        number = float(text)
    except ValueError:
        return None
    return number if math.isfinite(number * number) else None


def _errors(predictions: Sequence[Prediction], task: TaskInfo) -> FloatArray:
    """Return `(N,)` answer minus gold; an unreadable answer counts as the end of the scale farther from the gold."""
    low, high = task.scale
    errors = np.empty(len(predictions))
    for index, row in enumerate(predictions):
        gold, answer = _number(row.target), _number(row.prediction)
        if gold is None:
            raise DataError(f"query {row.id} of user {row.user}: the gold rating {row.target!r} is not a number")
        if answer is None:
            answer = low if abs(low - gold) > abs(high - gold) else high
        errors[index] = answer - gold
    return errors


def _rouge(measure: Callable[[Sequence[str], Sequence[str]], float]) -> Contributions:
    def contributions(predictions: Sequence[Prediction], task: TaskInfo) -> FloatArray:
        split = latin_words if task.official else words
        # The whole gold counts: cutting it at ": ", as some evaluations do, truncates headlines.
        values = [measure(split(row.target), split(row.prediction)) for row in predictions]
        return np.asarray(values, dtype=np.float64)[:, None]

    return contributions


def _style(match: Callable[[str, str], float]) -> Contributions:
    def contributions(predictions: Sequence[Prediction], task: TaskInfo) -> FloatArray:
        del task
        return np.asarray([match(row.target, row.prediction) for row in predictions], dtype=np.float64)[:, None]

    return contributions


def _unpaired(predictions: Sequence[Prediction], task: TaskInfo) -> FloatArray:
    raise DataError("a distance of styles is defined on all answers of a user and their history, not on one answer")


def _absolute_errors(predictions: Sequence[Prediction], task: TaskInfo) -> FloatArray:
    return np.abs(_errors(predictions, task))[:, None]


def _squared_errors(predictions: Sequence[Prediction], task: TaskInfo) -> FloatArray:
    return np.square(_errors(predictions, task))[:, None]


def _losses(name: Literal["loss", "label_loss"]) -> Contributions:
    def contributions(predictions: Sequence[Prediction], task: TaskInfo) -> FloatArray:
        del task
        values = [math.nan if (value := getattr(row, name)) is None else value for row in predictions]
        return np.asarray(values, dtype=np.float64)[:, None]

    return contributions


def _mean(sums: FloatArray, counts: FloatArray) -> FloatArray:
    return np.asarray(sums[..., 0] / counts)


def _root_mean(sums: FloatArray, counts: FloatArray) -> FloatArray:
    return np.sqrt(sums[..., 0] / counts)


def _f1_by_label(sums: FloatArray) -> tuple[FloatArray, NDArray[np.bool_]]:
    hits, golds, predicted = np.split(sums, 3, axis=-1)
    either = golds + predicted
    present = either > 0
    return 2 * hits / np.where(present, either, 1.0), present


def _f1_fixed(sums: FloatArray, counts: FloatArray) -> FloatArray:
    """Macro-F1 over the fixed list: a label without golds and predictions counts as 0, as in the official script."""
    del counts
    return np.asarray(_f1_by_label(sums)[0].mean(axis=-1))


def _f1_present(sums: FloatArray, counts: FloatArray) -> FloatArray:
    """Macro-F1 over the labels in a user's golds or predictions; over all 15 labels, 3 could not exceed .2."""
    del counts
    values, present = _f1_by_label(sums)
    return np.asarray(values.sum(axis=-1) / np.maximum(present.sum(axis=-1), 1))


STYLE_METRICS, STYLE_DISTANCES = tuple(style.MATCHES), (style.DISTANCE, style.LENGTH_GAP)
"""Metrics of free text beside `TASK_METRICS`: matches per query, and distances per user (`scoring.score_all`)."""

METRICS: Mapping[str, Metric] = MappingProxyType(
    {
        metric.name: metric
        for metric in (
            Metric("accuracy", True, _accuracy, _mean, _mean),
            Metric("f1_macro", True, _confusions, _f1_fixed, _f1_present),
            Metric("mae", False, _absolute_errors, _mean, _mean),
            Metric("rmse", False, _squared_errors, _root_mean, _root_mean),
            Metric("rouge1", True, _rouge(rouge_1), _mean, _mean),
            Metric("rougeL", True, _rouge(rouge_l), _mean, _mean),
            *(Metric(name, True, _style(match), _mean, _mean) for name, match in style.MATCHES.items()),
            *(Metric(name, False, _unpaired, _mean, _mean) for name in STYLE_DISTANCES),
            Metric("loss", False, _losses("loss"), _mean, _mean),
            Metric("label_loss", False, _losses("label_loss"), _mean, _mean),
        )
    }
)

TASK_METRICS: Mapping[TaskKind, tuple[str, ...]] = MappingProxyType(
    {
        "classification": ("accuracy", "f1_macro"),
        "rating": ("mae", "rmse"),
        "generation": ("rouge1", "rougeL"),
    }
)
"""The metrics of each kind of task; the first is the primary one."""

LOSSES = ("loss", "label_loss")
"""Metrics of any task that only some methods have: answer loss per token, and loss over the labels per query."""


def primary_metric(task: TaskInfo) -> str:
    """Return the name of the task's main metric: accuracy, mae or rouge1."""
    return TASK_METRICS[task.kind][0]
