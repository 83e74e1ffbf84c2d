"""Weights of several tasks in one run: an answer of one task counts as much in training as an answer of another.

The loss is a mean over answer tokens. Without weights, a task whose answers are long has most of it: of a label of two
tokens beside a headline of twelve, the label would have a seventh.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import islice

from proper.config import Config
from proper.data.batching import RowEncoder
from proper.data.encoder import EncodedExample, HistoryRow
from proper.data.histories import Histories

ROWS = 2000
"""Rows from which the mean length of a task's answers is estimated."""

TOKENS = 500_000
"""Budget of the sample that these rows are taken from, so that it is spread over all users."""


@dataclass(frozen=True)
class WeightedEncoder:
    """A `RowEncoder` that gives each row the weight of its task."""

    encoder: RowEncoder
    weights: Sequence[float]

    @property
    def max_length(self) -> int:
        """Longest row in tokens."""
        return self.encoder.max_length

    def encode(self, example: HistoryRow, /) -> EncodedExample:
        """Encode an interaction, with its task's weight on its loss."""
        return replace(self.encoder.encode(example), weight=self.weights[example.task])


def with_task_weights(config: Config, dataset: Histories, encoder: RowEncoder, seed: int) -> RowEncoder:
    """Return an encoder that weighs the tasks of `config`; with one task, `encoder` itself."""
    if not config.tasks:
        return encoder
    rows = [encoder.encode(row) for row in islice(dataset.sample("all", TOKENS, seed).rows(0), ROWS)]
    wanted = [task.weight for task in config.tasks.values()]
    return WeightedEncoder(encoder, task_weights([(row.task, row.answers) for row in rows], wanted))


def task_weights(answers: Sequence[tuple[int, int]], wanted: Sequence[float]) -> list[float]:
    """Return the factor on the loss of each task's rows.

        w_t = c * wanted_t / (mean answer tokens of task t)        c: such that the weights' mean over tokens is 1

    Args:
        answers: task and number of answer tokens of each row.
        wanted: weight of an answer of each task, `tasks.NAME.weight`.

    Returns:
        The factors; 1 for a task without rows.
    """
    rows, tokens = [0] * len(wanted), [0] * len(wanted)
    for task, length in answers:
        rows[task] += 1
        tokens[task] += length
    each = [want * count / length if length else 0.0 for want, count, length in zip(wanted, rows, tokens, strict=True)]
    total = sum(weight * length for weight, length in zip(each, tokens, strict=True))
    scale = sum(tokens) / total if total else 0.0
    return [weight * scale if weight else 1.0 for weight in each]
