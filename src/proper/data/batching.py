"""Tokenization and collation: prompts and targets to left-padded token batches with labels.

Left padding aligns every answer at the end of its row, so one slice of the logits covers all answers and decoding can
continue from the same batch. Position ids are explicit, and the attention mask hides the padding.
"""

from __future__ import annotations

import copy
import itertools
import random
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar

import torch
from jaxtyping import Int
from torch import Tensor

from proper.errors import InputError

_TAIL = 16
"""Tokens at a prompt's end that truncation keeps: they hold the instruction."""

IGNORED = -100
"""The label of a token that is not part of an answer."""

MARK = "\ufdd0"
"""A Unicode noncharacter: reserved for internal use, never part of interchanged text."""


class PromptAndTarget(Protocol):
    """Anything with a prompt, a target and a user."""

    @property
    def prompt(self) -> str: ...  # noqa: D102
    @property
    def target(self) -> str: ...  # noqa: D102
    @property
    def user(self) -> str: ...  # noqa: D102


class Sized(PromptAndTarget, Protocol):
    """An interaction with its untruncated length in tokens."""

    @property
    def tokens(self) -> int: ...  # noqa: D102


Row = TypeVar("Row", bound=Sized)


@dataclass(frozen=True, slots=True)
class EncodedExample:
    """One tokenized interaction: `ids` is the prompt followed by the answer, which starts at index `start`."""

    user: str
    ids: tuple[int, ...]
    start: int


@dataclass(frozen=True)
class Batch:
    """B left-padded rows of T tokens, with labels for the last A tokens."""

    users: tuple[str, ...]
    input_ids: Int[Tensor, "B T"]
    attention_mask: Int[Tensor, "B T"]
    position_ids: Int[Tensor, "B T"]
    labels: Int[Tensor, "B A"]

    @property
    def tokens(self) -> int:
        """Number of tokens that are not padding."""
        return int(self.attention_mask.sum())


class Encoder:
    """Tokenizer wrapper with the project's conventions.

    A prompt starts with the tokenizer's BOS tokens; an answer follows after one space and ends with the EOS token.
    A prompt that is too long is truncated in the middle: its head and its last 16 tokens stay. The name of a special
    token in a user's text (`<s>`, `<|im_end|>`) is tokenized as ordinary text.

    Args:
        tokenizer: a Hugging Face tokenizer.
        max_length: maximum tokens of a prompt and its answer together.
        rows: rows of the model's embedding matrix; a text with an id beyond them is refused. None disables the check.
        ends: further ids that end an answer.

    Attributes:
        end: the id appended to an answer in training (EOS); None if the tokenizer has none.
        ends: every id that ends an answer.
        start: the tokenizer's BOS tokens.
        names: ids of the special tokens by name.
    """

    def __init__(self, tokenizer: Any, max_length: int, *, rows: int | None = None, ends: Iterable[int] = ()) -> None:
        self.tokenizer, self.max_length, self.rows = tokenizer, max_length, rows
        self.end: int | None = tokenizer.eos_token_id
        self.ends = frozenset(ends) | (set() if self.end is None else {self.end})
        self.names = special_names(tokenizer)
        # A private copy: `split_special_tokens` is state of the tokenizer object, which threads share.
        self._splitting = copy.deepcopy(tokenizer)
        # A name of one character (a newline as EOS) occurs in ordinary text, so it is not forbidden.
        special = {number for name, number in self.names.items() if len(name) > 1}
        self._beyond = (
            set() if rows is None else set(range(rows, max([len(tokenizer), *tokenizer.get_vocab().values()]) + 1))
        )
        self._forbidden = special | self._beyond
        # SentencePiece tokenizers add the leading space themselves; a second space would become a separate token.
        self._space = " " if len(self.tokens(" a")) <= len(self.tokens("a")) else ""
        self.start = tuple(i for i in tokenizer("").input_ids if i != self.end)

    def prompt(self, text: str, room: int = 0) -> tuple[int, ...]:
        """Encode a prompt, truncated in the middle to leave `room` tokens; at least half of `max_length` stays."""
        ids = self.tokens(text)
        limit = max(self.max_length - room, self.max_length // 2) - len(self.start)
        if len(ids) > limit:
            tail = min(_TAIL, limit // 2)
            ids = ids[: limit - tail] + ids[len(ids) - tail :]
        return self.start + ids

    def answer(self, text: str) -> tuple[int, ...]:
        """Encode an answer with its EOS token, truncated to half of `max_length`."""
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
        """Encode a user's text, untruncated, without BOS tokens.

        Raises:
            InputError: the text contains a token that the model has no embedding for.
        """
        return tuple(self._whole([text])[0])

    def filled(self, text: str) -> tuple[int, ...]:
        """Encode a rendered chat template whose contents were quoted (`quote`).

        Only the special tokens that the template itself wrote become control tokens.

        Raises:
            InputError: the text contains a token that the model has no embedding for.
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
                # A Unigram or word vocabulary has the names as ordinary words; cut in two they are not found.
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
    """Collate rows into one left-padded batch."""
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
    """Return the distinct users of a batch in order of appearance, and each row's index into them."""
    names: dict[str, int] = {}
    numbers = [names.setdefault(user, len(names)) for user in users]
    return list(names), numbers


def similar_batches(rows: Iterator[Row], size: int, shuffle: random.Random, window: int = 32) -> Iterator[list[Row]]:
    """Length-bucketed batching of a stream: sort `window` batches at a time by length and yield them shuffled.

    The number of batches is always ceil(rows / size); memory holds one window.
    """
    while rows_in_window := list(itertools.islice(rows, size * window)):
        rows_in_window.sort(key=lambda row: row.tokens)
        batches = [rows_in_window[at : at + size] for at in range(0, len(rows_in_window), size)]
        shuffle.shuffle(batches)
        yield from batches


def by_length(lengths: Sequence[int], size: int) -> list[list[int]]:
    """Return row indices sorted by length, in chunks of `size`."""
    order = sorted(range(len(lengths)), key=lambda i: lengths[i])
    return [order[at : at + size] for at in range(0, len(order), size)]


def special_names(tokenizer: Any) -> dict[str, int]:
    """Return the ids of a tokenizer's special tokens by name, without UNK, which ordinary text produces."""
    found = dict(zip(tokenizer.all_special_tokens, tokenizer.all_special_ids, strict=True))
    added = getattr(tokenizer, "added_tokens_decoder", {})
    found |= {token.content: number for number, token in added.items() if token.special}
    return {str(name): number for name, number in found.items() if number != getattr(tokenizer, "unk_token_id", None)}


def quote(text: str, names: Iterable[str]) -> str:
    """Mark the names in a user's text, so that `pieces` does not take them for special tokens of the template."""
    text = text.replace(MARK, "")
    pattern = _any_of(name for name in names if len(name) > 1)
    return re.sub(pattern, lambda found: found[0][0] + MARK + found[0][1:], text) if pattern else text


def pieces(text: str, names: Iterable[str]) -> Iterator[tuple[str, bool]]:
    """Split a rendered template into (piece, whether it is a special token); quoted names are ordinary text."""
    pattern = _any_of(names)
    for at, piece in enumerate(re.split(f"({pattern})", text) if pattern else [text]):
        if piece:
            yield piece.replace(MARK, ""), at % 2 == 1


def cut_names(text: str, names: Iterable[str]) -> list[str]:
    """Split a text after the first character of every name in it, so that no part contains a whole name."""
    return [part for part in quote(text, names).split(MARK) if part]


def _any_of(names: Iterable[str]) -> str:
    return "|".join(re.escape(name) for name in sorted(names, key=len, reverse=True) if name)
