"""Text to token batches: left-padded rows whose last tokens are the answer.

Left padding puts every row's answer at the end, so one slice of the logits holds all answers and the same batch can be
decoded further. Positions are given explicitly; a row does not see its padding. Knows nothing about models.
"""

from __future__ import annotations

import itertools
import random
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar

import torch
from jaxtyping import Int
from torch import Tensor

_TAIL = 16
"""Tokens at a prompt's end that truncation keeps: the words that ask for the answer."""

IGNORED = -100
"""The label of a token that is not part of an answer."""


class Asked(Protocol):
    """Anything with a prompt, a target and a user."""

    @property
    def prompt(self) -> str: ...  # noqa: D102
    @property
    def target(self) -> str: ...  # noqa: D102
    @property
    def user(self) -> str: ...  # noqa: D102


class Sized(Asked, Protocol):
    """An interaction that knows its untruncated length in tokens."""

    @property
    def tokens(self) -> int: ...  # noqa: D102


Row = TypeVar("Row", bound=Sized)


@dataclass(frozen=True, slots=True)
class Encoded:
    """One interaction in tokens: `ids` is prompt then answer, the answer starts at `start`."""

    user: str
    ids: tuple[int, ...]
    start: int


@dataclass(frozen=True)
class Batch:
    """B rows of T tokens, padded on the left, with their last A tokens' labels."""

    users: tuple[str, ...]
    input_ids: Int[Tensor, "B T"]
    attention_mask: Int[Tensor, "B T"]
    position_ids: Int[Tensor, "B T"]
    labels: Int[Tensor, "B A"]

    @property
    def tokens(self) -> int:
        """Tokens that are not padding."""
        return int(self.attention_mask.sum())


class Encoder:
    """A tokenizer with the project's conventions.

    A prompt gets the tokenizer's own start tokens; an answer is joined to it by one space and closed by the end token.
    A prompt that is too long loses its middle: its head and its last 16 tokens stay.
    """

    def __init__(self, tokenizer: Any, max_length: int) -> None:
        self.tokenizer, self.max_length = tokenizer, max_length
        self.end: int | None = tokenizer.eos_token_id
        # SentencePiece tokenizers put the space in by themselves; a second one would be a token of its own.
        self._space = " " if len(self._tokens(" a")) <= len(self._tokens("a")) else ""
        start = [i for i in tokenizer("").input_ids if i != self.end]
        self._start = tuple(start)

    def prompt(self, text: str, room: int = 0) -> tuple[int, ...]:
        """Encode a prompt, cut in the middle so that `room` more tokens fit the model's length; half of it is safe."""
        ids = self._tokens(text)
        limit = max(self.max_length - room, self.max_length // 2) - len(self._start)
        if len(ids) > limit:
            tail = min(_TAIL, limit // 2)
            ids = ids[: limit - tail] + ids[len(ids) - tail :]
        return self._start + ids

    def answer(self, text: str) -> tuple[int, ...]:
        """Encode an answer with its end token; it may take half the model's length."""
        ids = self._tokens(self._space + text.strip())[: self.max_length // 2 - 1]
        return ids if self.end is None else (*ids, self.end)

    def encode(self, example: Asked) -> Encoded:
        """Encode one interaction."""
        answer = self.answer(example.target)
        prompt = self.prompt(example.prompt, room=len(answer))
        return Encoded(example.user, prompt + answer, len(prompt))

    def count(self, prompts: Sequence[str], targets: Sequence[str]) -> list[int]:
        """Return the untruncated length of each interaction in tokens."""
        if not prompts:
            return []
        answers = [self._space + target.strip() for target in targets]
        sides = [self.tokenizer(list(t), add_special_tokens=False).input_ids for t in (prompts, answers)]
        extra = len(self._start) + (self.end is not None)
        return [len(p) + len(t) + extra for p, t in zip(*sides, strict=True)]

    def _tokens(self, text: str) -> tuple[int, ...]:
        return tuple(self.tokenizer(text, add_special_tokens=False).input_ids)


def collate(rows: Sequence[Encoded], pad: int, device: torch.device | str = "cpu") -> Batch:
    """Pad rows on the left into one batch."""
    length = max(len(row.ids) for row in rows)
    answer = max(len(row.ids) - row.start for row in rows)
    ids = torch.full((len(rows), length), pad)
    mask = torch.zeros((len(rows), length), dtype=torch.long)
    labels = torch.full((len(rows), answer), IGNORED)
    for at, row in enumerate(rows):
        ids[at, length - len(row.ids) :] = torch.tensor(row.ids)
        mask[at, length - len(row.ids) :] = 1
        tail = row.ids[row.start :]
        labels[at, answer - len(tail) :] = torch.tensor(tail)
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    users = tuple(row.user for row in rows)
    return Batch(users, *(t.to(device) for t in (ids, mask, positions, labels)))


def number_users(users: Iterable[str]) -> tuple[list[str], list[int]]:
    """Return the distinct users of a batch in order of appearance, and each row's number among them."""
    names: dict[str, int] = {}
    numbers = [names.setdefault(user, len(names)) for user in users]
    return list(names), numbers


def similar_batches(rows: Iterator[Row], size: int, shuffle: random.Random, window: int = 32) -> Iterator[list[Row]]:
    """Cut a stream into batches of similar length: sort `window` batches at a time by length, hand them out shuffled.

    There are always ceil(rows / size) batches, and memory holds one window.
    """
    while held := list(itertools.islice(rows, size * window)):
        held.sort(key=lambda row: row.tokens)
        batches = [held[at : at + size] for at in range(0, len(held), size)]
        shuffle.shuffle(batches)
        yield from batches
