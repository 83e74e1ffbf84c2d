"""Tokenization of prompts and answers, with or without the tokenizer's chat template."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from proper.data.chat import MARK, ChatFormat, TextMessage, Turn, cut_names, pieces, plain_prompt, special_names
from proper.errors import ConfigError, InputError

_TAIL = 16
"""Tokens at a prompt's end that truncation keeps: they hold the instruction."""


class PromptAndTarget(Protocol):
    """Anything with a prompt, a target and a user."""

    @property
    def prompt(self) -> str: ...  # noqa: D102
    @property
    def target(self) -> str: ...  # noqa: D102
    @property
    def user(self) -> str: ...  # noqa: D102


@dataclass(frozen=True, slots=True)
class EncodedExample:
    """One tokenized interaction: `ids` is the prompt followed by the answer, which starts at index `start`."""

    user: str
    ids: tuple[int, ...]
    start: int


class Encoder:
    """Tokenizer wrapper with the project's conventions.

    Without a chat template, a prompt starts with the tokenizer's BOS tokens; an answer follows after one space and ends
    with the EOS token. With a chat template, a prompt is a user message in the template, and an answer ends with the
    token that closes an assistant's message there. A prompt that is too long is truncated in the middle: its head and
    its last 16 tokens stay, and the template around it. The name of a special token in a user's text (`<s>`,
    `<|im_end|>`) is tokenized as ordinary text.

    Args:
        tokenizer: a Hugging Face tokenizer.
        max_length: maximum tokens of a prompt and its answer together.
        rows: rows of the model's embedding matrix; a text with an id beyond them is refused. None disables the check.
        ends: further ids that end an answer.
        chat: whether prompts use the tokenizer's chat template.

    Attributes:
        end: the id appended to an answer in training; None if the tokenizer has none.
        ends: every id that ends an answer.
        start: tokens before a prompt's text: BOS, or the beginning of the chat template.
        after: tokens between a prompt's text and the answer: the rest of the chat template.

    Raises:
        ConfigError: the chat template takes more than a quarter of `max_length`.
        names: ids of the special tokens by name.
    """

    def __init__(
        self,
        tokenizer: Any,
        max_length: int,
        *,
        rows: int | None = None,
        ends: Iterable[int] = (),
        chat: bool = False,
    ) -> None:
        self.tokenizer, self.max_length, self.rows = tokenizer, max_length, rows
        self.names = special_names(tokenizer)
        self.chat = ChatFormat(tokenizer, self.names) if chat else None
        closing = None if self.chat is None or self.chat.closing is None else self.names[self.chat.closing]
        self.end: int | None = tokenizer.eos_token_id if closing is None else closing
        self.ends = frozenset(ends) | {end for end in (tokenizer.eos_token_id, closing) if end is not None}
        # A private copy: `split_special_tokens` is state of the tokenizer object, which threads share.
        self._splitting = copy.deepcopy(tokenizer)
        # A name of one character (a newline as EOS) occurs in ordinary text, so it is not forbidden.
        special = {number for name, number in self.names.items() if len(name) > 1}
        self._beyond = (
            set() if rows is None else set(range(rows, max([len(tokenizer), *tokenizer.get_vocab().values()]) + 1))
        )
        self._forbidden = special | self._beyond
        # SentencePiece tokenizers add the leading space themselves; a second space would become a separate token.
        # In a chat template the answer follows the template's own text.
        self._space = " " if not chat and len(self.tokens(" a")) <= len(self.tokens("a")) else ""
        self.start, self.after = self._around()

    def prompt(self, text: str, room: int = 0) -> tuple[int, ...]:
        """Encode a prompt, truncated in the middle to leave `room` tokens; at least half of `max_length` stays."""
        limit = max(self.max_length - room, self.max_length // 2)
        whole = self.untruncated(text)
        if len(whole) <= limit:
            return whole
        ids, limit = self.tokens(text), limit - len(self.start) - len(self.after)
        tail = min(_TAIL, limit // 2)
        return self.start + ids[: limit - tail] + ids[len(ids) - tail :] + self.after

    def untruncated(self, prompt: str | Sequence[Turn]) -> tuple[int, ...]:
        """Encode a prompt, or the messages of a conversation, whatever its length.

        Raises:
            InputError: the text contains a token that the model has no embedding for, or the chat template does not
                allow these roles in this order.
        """
        if self.chat is None:
            return self.start + self.tokens(prompt if isinstance(prompt, str) else plain_prompt(prompt))
        return self._templated(self.chat.render([TextMessage("user", prompt)] if isinstance(prompt, str) else prompt))

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
        extra = len(self.start) + len(self.after) + (self.end is not None)
        return [len(p) + len(t) + extra for p, t in zip(*sides, strict=True)]

    def tokens(self, text: str) -> tuple[int, ...]:
        """Encode a user's text, untruncated, without BOS tokens.

        Raises:
            InputError: the text contains a token that the model has no embedding for.
        """
        return tuple(self._whole([text])[0])

    def _templated(self, text: str) -> tuple[int, ...]:
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

    def _around(self) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Return the tokens before and after a prompt's text."""
        if self.chat is None:
            return tuple(i for i in self.tokenizer("").input_ids if i != self.end), ()
        start, after = self._templated(self.chat.before), self._templated(self.chat.after)
        if 4 * (len(start) + len(after)) > self.max_length:
            size = len(start) + len(after)
            raise ConfigError(
                f"compute.max_length: {self.max_length} is too short for the chat template: it adds {size} tokens to "
                f"every prompt; set it to {4 * size} or more, or data.chat: off"
            )
        return start, after

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
