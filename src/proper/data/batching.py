"""Text to token batches: left-padded rows whose last tokens are the answer.

Left padding puts every row's answer at the end, so one slice of the logits holds all answers and the same batch can be
decoded further. Positions are given explicitly; a row does not see its padding. Knows nothing about models.
"""

from __future__ import annotations

import copy
import itertools
import random
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar

import torch
from jaxtyping import Int
from torch import Tensor

from proper.data.special_tokens import MARK, cut_names, pieces, special_names
from proper.errors import InputError

_TAIL = 16
"""Tokens at a prompt's end that truncation keeps: the words that ask for the answer."""

IGNORED = -100
"""The label of a token that is not part of an answer."""


class PromptAndTarget(Protocol):
    """Anything with a prompt, a target and a user."""

    @property
    def prompt(self) -> str: ...  # noqa: D102
    @property
    def target(self) -> str: ...  # noqa: D102
    @property
    def user(self) -> str: ...  # noqa: D102


class Sized(PromptAndTarget, Protocol):
    """An interaction that knows its untruncated length in tokens."""

    @property
    def tokens(self) -> int: ...  # noqa: D102


Row = TypeVar("Row", bound=Sized)


@dataclass(frozen=True, slots=True)
class EncodedExample:
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
    A prompt that is too long loses its middle: its head and its last 16 tokens stay. A special token's name in a
    user's text (`<s>`, `<|im_end|>`) is ordinary text.

    Args:
        tokenizer: turns text into ids.
        max_length: tokens that a prompt and its answer may have together.
        rows: of the model's embeddings; a text with an id beyond them is refused. None checks nothing.
        ends: further ids that end an answer.

    Attributes:
        end: closes an answer in training; None where answers have no end.
        ends: every id that ends an answer.
        start: the tokenizer's own start tokens.
        names: ids of the special tokens by name.
    """

    def __init__(self, tokenizer: Any, max_length: int, *, rows: int | None = None, ends: Iterable[int] = ()) -> None:
        self.tokenizer, self.max_length, self.rows = tokenizer, max_length, rows
        self.end: int | None = tokenizer.eos_token_id
        self.ends = frozenset(ends) | (set() if self.end is None else {self.end})
        self.names = special_names(tokenizer)
        # A copy of its own, since splitting special tokens is a state of the tokenizer, and threads share that.
        self._splitting = copy.deepcopy(tokenizer)
        # A name of one character (a newline as the end token) is what ordinary text is made of.
        special = {number for name, number in self.names.items() if len(name) > 1}
        self._beyond = (
            set() if rows is None else set(range(rows, max([len(tokenizer), *tokenizer.get_vocab().values()]) + 1))
        )
        self._forbidden = special | self._beyond
        # SentencePiece tokenizers put the space in by themselves; a second one would be a token of its own.
        self._space = " " if len(self.tokens(" a")) <= len(self.tokens("a")) else ""
        self.start = tuple(i for i in tokenizer("").input_ids if i != self.end)

    def prompt(self, text: str, room: int = 0) -> tuple[int, ...]:
        """Encode a prompt, cut in the middle so that `room` more tokens fit the model's length; half of it is safe."""
        ids = self.tokens(text)
        limit = max(self.max_length - room, self.max_length // 2) - len(self.start)
        if len(ids) > limit:
            tail = min(_TAIL, limit // 2)
            ids = ids[: limit - tail] + ids[len(ids) - tail :]
        return self.start + ids

    def answer(self, text: str) -> tuple[int, ...]:
        """Encode an answer with its end token; it may take half the model's length."""
        ids = self.tokens(self._space + text.strip())[: self.max_length // 2 - 1]
        return ids if self.end is None else (*ids, self.end)

    def encode(self, example: PromptAndTarget) -> EncodedExample:
        """Encode one interaction."""
        answer = self.answer(example.target)
        prompt = self.prompt(example.prompt, room=len(answer))
        return EncodedExample(example.user, prompt + answer, len(prompt))

    def count(self, prompts: Sequence[str], targets: Sequence[str]) -> list[int]:
        """Return the untruncated length of each interaction in tokens."""
        if not prompts:
            return []
        answers = [self._space + target.strip() for target in targets]
        sides = [self._whole(list(texts)) for texts in (prompts, answers)]
        extra = len(self.start) + (self.end is not None)
        return [len(p) + len(t) + extra for p, t in zip(*sides, strict=True)]

    def tokens(self, text: str) -> tuple[int, ...]:
        """Encode a user's text, uncut, without start tokens.

        Raises:
            InputError: it has a token that the model has no embedding for.
        """
        return tuple(self._whole([text])[0])

    def filled(self, text: str) -> tuple[int, ...]:
        """Encode what a chat template made of contents that were quoted (`markup.quote`): only its own tokens count.

        Raises:
            InputError: it has a token that the model has no embedding for.
        """
        if MARK not in text:
            return tuple(self._checked(text, self.tokenizer(text, add_special_tokens=False).input_ids, self._beyond))
        found: list[int] = []
        for piece, special in pieces(text, self.names):
            found += [self.names[piece]] if special else self.tokens(piece)
        return tuple(self._checked(text, found, self._beyond))

    def decode(self, ids: Sequence[int]) -> str:
        """Return an answer's text, stripped."""
        text: str = self.tokenizer.decode(ids, skip_special_tokens=True)
        return text.strip()

    def _whole(self, texts: list[str]) -> list[list[int]]:
        found = self._ordinary(texts)
        for at, ids in enumerate(found):
            if not self._forbidden.isdisjoint(ids):
                # A Unigram or word vocabulary has the names as words; in parts they are none.
                parts = cut_names(texts[at], [*self.names, *self._names_beyond()])
                cut = [number for part in self._ordinary(parts) for number in part]
                found[at] = self._checked(texts[at], cut, self._forbidden)
        return found

    def _ordinary(self, texts: list[str]) -> list[list[int]]:
        found: list[list[int]] = self._splitting(texts, add_special_tokens=False, split_special_tokens=True).input_ids
        return found

    def _names_beyond(self) -> list[str]:
        return [str(name) for name in self.tokenizer.convert_ids_to_tokens(sorted(self._beyond)) if name]

    def _checked(self, text: str, ids: list[int], refused: set[int]) -> list[int]:
        wrong = next((number for number in ids if number in refused), None)
        if wrong is not None:
            name = self.tokenizer.convert_ids_to_tokens(wrong)
            why = f"the model has {self.rows} embeddings" if wrong in self._beyond else "it is a control token"
            raise InputError(f"the text holds {name!r}, token {wrong}, which cannot be used: {why}")
        return ids


def collate(rows: Sequence[EncodedExample], pad: int, device: torch.device | str = "cpu") -> Batch:
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
