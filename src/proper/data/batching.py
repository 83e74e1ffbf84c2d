"""Collation: encoded interactions to left-padded token batches with labels.

Left padding aligns every answer at the end of its row, so one slice of the logits covers all answers and decoding can
continue from the same batch. Position ids are explicit, and the attention mask hides the padding.
"""

from __future__ import annotations

import itertools
import random
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol, TypeVar

import torch
from jaxtyping import Float, Int
from torch import Tensor

from proper.data.encoder import EncodedExample, HistoryRow, PromptAndTarget
from proper.data.label_tree import LabelChoice

IGNORED = -100
"""The label of a token that is not part of an answer."""


class Sized(PromptAndTarget, Protocol):
    """An interaction with its untruncated length in tokens."""

    @property
    def tokens(self) -> int: ...  # noqa: D102


SizedT = TypeVar("SizedT", bound=Sized)


class RowEncoder(Protocol):
    """Interface that turns the interactions of stages 2 and 3 into training rows; `Encoder` implements it."""

    @property
    def max_length(self) -> int: ...  # noqa: D102
    def encode(self, example: HistoryRow, /) -> EncodedExample: ...  # noqa: D102


@dataclass(frozen=True)
class Batch:
    """B left-padded rows of T tokens, with labels for the last A tokens.

    Attributes:
        choices: where each row's answer is a choice among labels, the choices, and no token is labelled; else empty.
        tasks: the number of each row's task, from 0.
        weights: factor on each row's loss; None: 1 for all rows.
    """

    users: tuple[str, ...]
    input_ids: Int[Tensor, "B T"]
    attention_mask: Int[Tensor, "B T"]
    position_ids: Int[Tensor, "B T"]
    labels: Int[Tensor, "B A"]
    choices: tuple[LabelChoice, ...] = ()
    tasks: tuple[int, ...] = ()
    weights: Float[Tensor, "B"] | None = None

    @property
    def tokens(self) -> int:
        """Number of tokens that are not padding."""
        return int(self.attention_mask.sum())

    def weighed(self, losses: Float[Tensor, "B"]) -> Float[Tensor, "B"]:
        """Return the rows' losses, each times its weight."""
        return losses if self.weights is None else losses * self.weights


def collate(rows: Sequence[EncodedExample], pad: int, device: torch.device | str = "cpu") -> Batch:
    """Collate rows into one left-padded batch; either all rows are choices among labels or none is."""
    length = max(len(row.ids) for row in rows)
    answer = max(len(row.ids) - row.start for row in rows)
    ids = torch.full((len(rows), length), pad)
    mask = torch.zeros((len(rows), length), dtype=torch.long)
    labels = torch.full((len(rows), answer), IGNORED)
    for at, row in enumerate(rows):
        ids[at, length - len(row.ids) :] = torch.tensor(row.ids)
        mask[at, length - len(row.ids) :] = 1
        if row.choice is not None:
            continue
        tail = row.ids[row.start :]
        labels[at, answer - len(tail) :] = torch.tensor(tail)
        for index in row.between:
            labels[at, answer - len(row.ids) + index] = IGNORED
    positions = position_ids(mask)
    choices = tuple(row.choice for row in rows if row.choice is not None)
    for at, choice in enumerate(choices):
        if choice.tree.size:
            positions[at, length - choice.tree.size :] = rows[at].start + choice.tree.depth
    users = tuple(row.user for row in rows)
    ids, mask, positions, labels = (each.to(device) for each in (ids, mask, positions, labels))
    weighed = any(row.weight != 1 for row in rows)
    weights = torch.tensor([row.weight for row in rows], device=device) if weighed else None
    return Batch(users, ids, mask, positions, labels, choices, tuple(row.task for row in rows), weights)


def position_ids(mask: Int[Tensor, "B T"]) -> Int[Tensor, "B T"]:
    """Return each token's position in its left-padded row, from the attention mask; 0 for padding."""
    return (mask.cumsum(1) - 1).clamp(min=0)


def number_users(users: Iterable[str]) -> tuple[list[str], list[int]]:
    """Return the distinct users of a batch in order of appearance, and each row's index into them."""
    names: dict[str, int] = {}
    numbers = [names.setdefault(user, len(names)) for user in users]
    return list(names), numbers


def similar_batches(
    rows: Iterator[SizedT], size: int, shuffle: random.Random, window: int = 32
) -> Iterator[list[SizedT]]:
    """Length-bucketed batching of a stream: sort `window` batches at a time by length and yield them shuffled.

    The number of batches is always ceil(rows / size); memory holds one window.
    """
    while rows_in_window := list(itertools.islice(rows, size * window)):
        rows_in_window.sort(key=lambda row: row.tokens)
        batches = [rows_in_window[at : at + size] for at in range(0, len(rows_in_window), size)]
        shuffle.shuffle(batches)
        yield from batches


def by_length(lengths: Sequence[int], size: int, tokens: int) -> list[list[int]]:
    """Return row indices sorted by length, in chunks of at most `size` rows and `tokens` tokens, padding included.

    A longer row is a chunk of its own.
    """
    chunks: list[list[int]] = []
    for row in sorted(range(len(lengths)), key=lambda i: lengths[i]):
        # Sorted by length, so the newest row is the longest one of its chunk.
        full = not chunks or len(chunks[-1]) == size or (len(chunks[-1]) + 1) * lengths[row] > tokens
        if full:
            chunks.append([])
        chunks[-1].append(row)
    return chunks
