"""Tokenization of prompts and answers, with or without the tokenizer's chat template."""

from __future__ import annotations

import copy
from bisect import bisect_left
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from proper.data.chat import (
    MARK,
    ChatFormat,
    TextMessage,
    Turn,
    conversation_lines,
    cut_names,
    pieces,
    plain_prompt,
    special_names,
)
from proper.data.conversations import split_turns
from proper.data.label_tree import LabelChoice
from proper.errors import ConfigError, InputError

_TAIL = 16
"""Tokens at a prompt's end that truncation keeps: they hold the instruction."""


class PromptAndTarget(Protocol):
    """Anything with a prompt, a target, a user and the number of its task."""

    @property
    def prompt(self) -> str: ...  # noqa: D102
    @property
    def target(self) -> str: ...  # noqa: D102
    @property
    def user(self) -> str: ...  # noqa: D102
    @property
    def task(self) -> int: ...  # noqa: D102


@dataclass(frozen=True, slots=True)
class EncodedExample:
    """One tokenized interaction: `ids` is the prompt followed by the answer, which starts at index `start`.

    With `data.assistant_loss: all`, `start` is where the first assistant's message of a conversation starts, and
    `between` are the indices from there on that are not part of an assistant's message.

    With a `choice`, the answer is one of several labels: from `start` on, `ids` are the tokens of its tree. `weight` is
    a factor on the row's loss.
    """

    user: str
    ids: tuple[int, ...]
    start: int
    between: tuple[int, ...] = ()
    choice: LabelChoice | None = None
    task: int = 0
    weight: float = 1.0

    @property
    def answers(self) -> int:
        """Number of tokens that the loss counts; 1 for a choice."""
        return 1 if self.choice is not None else len(self.ids) - self.start - len(self.between)


class HistoryRow(PromptAndTarget, Protocol):
    """A row of a history; ids of one history's rows are distinct."""

    @property
    def id(self) -> int: ...  # noqa: D102


class Encoder:
    """Tokenizer wrapper with the project's conventions.

    Without a chat template, a prompt starts with the tokenizer's BOS tokens; an answer follows after one space and ends
    with the EOS token. With a chat template, a prompt is a user message in the template, and an answer ends with the
    token that closes an assistant's message there. A prompt that is too long is truncated in the middle: its head and
    its last 16 tokens stay, and the template around it. The name of a special token in a user's text (`<s>`,
    `<|im_end|>`) is tokenized as ordinary text. A prompt of several messages (`conversations.join_turns`) that is too
    long loses its oldest messages.

    Args:
        tokenizer: a Hugging Face tokenizer.
        max_length: maximum tokens of a prompt and its answer together.
        rows: rows of the model's embedding matrix; a text with an id beyond them is refused. None disables the check.
        ends: further ids that end an answer.
        chat: whether prompts use the tokenizer's chat template.
        every_turn: whether `encode` marks every assistant's message of a conversation as an answer.

    Attributes:
        end: the id appended to an answer in training; None if the tokenizer has none.
        ends: every id that ends an answer.
        start: tokens before a prompt's text: BOS, or the beginning of the chat template.
        after: tokens between a prompt's text and the answer: the rest of the chat template.
        names: ids of the special tokens by name.

    Raises:
        ConfigError: the chat template takes more than a quarter of `max_length`.
    """

    def __init__(
        self,
        tokenizer: Any,
        max_length: int,
        *,
        rows: int | None = None,
        ends: Iterable[int] = (),
        chat: bool = False,
        every_turn: bool = False,
    ) -> None:
        self.tokenizer, self.max_length, self.rows, self.every_turn = tokenizer, max_length, rows, every_turn
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
        turns, limit = split_turns(text), max(self.max_length - room, self.max_length // 2)
        if turns is not None:
            kept = self._newest(turns, limit)
            if kept:
                return self.untruncated(kept)
            text = turns[-1].text
        whole = self.untruncated(text)
        if len(whole) <= limit:
            return whole
        ids, limit = self.tokens(text), limit - len(self.start) - len(self.after)
        tail = min(_TAIL, limit // 2)
        return self.start + ids[: limit - tail] + ids[len(ids) - tail :] + self.after

    def untruncated(self, prompt: str | Sequence[Turn]) -> tuple[int, ...]:
        """Encode a prompt, or the messages of a conversation, of any length.

        Raises:
            InputError: the text contains a token that the model has no embedding for, or the chat template does not
                allow these roles in this order.
        """
        turns = split_turns(prompt) if isinstance(prompt, str) else prompt
        if self.chat is None:
            return self.start + self.tokens(str(prompt) if turns is None else plain_prompt(turns))
        return self._templated(self.chat.render([TextMessage("user", str(prompt))] if turns is None else turns))

    def answer(self, text: str) -> tuple[int, ...]:
        """Encode an answer with its EOS token, truncated to half of `max_length`."""
        ids = self.tokens(self._space + text.strip())[: self.max_length // 2 - 1]
        return ids if self.end is None else (*ids, self.end)

    def encode(self, example: PromptAndTarget, last: bool = False) -> EncodedExample:
        """Encode one interaction; `last` marks only the last assistant message as an answer, for any setting.

        Raises:
            ConfigError: every assistant's message is wanted, and the chat template rewrites earlier ones.
        """
        answer = self.answer(example.target)
        prompt = self.prompt(example.prompt, room=len(answer))
        spans = self._earlier(example.prompt, prompt) if self.every_turn and not last else []
        if not spans:
            return EncodedExample(example.user, prompt + answer, len(prompt), task=example.task)
        answered = {at for begin, end in spans for at in range(begin, end)}
        start = spans[0][0]
        between = tuple(at for at in range(start, len(prompt)) if at not in answered)
        return EncodedExample(example.user, prompt + answer, start, between, task=example.task)

    def _newest(self, turns: Sequence[Turn], limit: int) -> list[Turn]:
        """Return the system's messages and the newest others that fit, from a user's message on; [] if none fit."""
        system = [turn for turn in turns if turn.role == "system"]
        others = [turn for turn in turns if turn.role != "system"]
        users = [at for at, turn in enumerate(others) if turn.role == "user" and at > 0]

        def fits(kept: Sequence[Turn]) -> bool:
            return len(self.untruncated(kept)) <= limit

        if fits(turns):
            return list(turns)
        # Fewer messages have fewer tokens: a conversation of hundreds is tokenized a few times, not once a message.
        first = bisect_left(users, True, key=lambda at: fits([*system, *others[at:]]))
        return [*system, *others[users[first] :]] if first < len(users) else []

    def _earlier(self, text: str, prompt: tuple[int, ...]) -> list[tuple[int, int]]:
        """Return the spans of the assistant's messages in a prompt: begin and end as indices of its tokens."""
        turns = split_turns(text)
        kept: Sequence[Turn] = [] if turns is None else self._newest(turns, len(prompt))
        spans = []
        for at, turn in enumerate(kept):
            if turn.role != "assistant" or at == 0:
                continue
            before = self._begin(kept[:at])
            # The last token may span the end of the template's text and the begin of the message.
            if prompt[: len(before) - 1] != before[:-1]:
                raise ConfigError(
                    "data.assistant_loss: all, but the backbone's chat template rewrites earlier messages; use last"
                )
            spans.append((len(before), self._end(kept[: at + 1], prompt, len(before))))
        return spans

    def _begin(self, turns: Sequence[Turn]) -> tuple[int, ...]:
        """Return the tokens before the assistant's answer to these messages, inside a longer conversation."""
        if self.chat is not None:
            return self.untruncated(turns)
        return self.start + self.tokens("\n".join([*conversation_lines(turns), "Assistant:"]))

    def _end(self, turns: Sequence[Turn], prompt: tuple[int, ...], begin: int) -> int:
        """Return the index behind the last of these messages and, with a chat template, the token that closes it."""
        if self.chat is not None and self.end in prompt[begin:]:
            return prompt.index(self.end, begin) + 1
        if self.chat is not None:
            return min(begin + len(self.tokens(turns[-1].text)), len(prompt))
        return len(self.start) + len(self.tokens("\n".join(conversation_lines(turns))))

    def count(self, prompts: Sequence[str], targets: Sequence[str]) -> list[int]:
        """Return the untruncated length of each interaction in tokens."""
        if not prompts:
            return []
        answers = [self._space + target.strip() for target in targets]
        sides = [self._whole(list(texts)) for texts in (prompts, answers)]
        extra = len(self.start) + len(self.after)
        whole = [
            len(tokens) + extra if split_turns(prompt) is None else len(self.untruncated(prompt))
            for prompt, tokens in zip(prompts, sides[0], strict=True)
        ]
        return [size + len(tokens) + (self.end is not None) for size, tokens in zip(whole, sides[1], strict=True)]

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
            around, opens = self.tokenizer("").input_ids, self.tokenizer("a").input_ids[:1]
            starts = around[:1] == opens == [self.tokenizer.bos_token_id]  # OPT: the start token is the end token
            return tuple(i for at, i in enumerate(around) if i != self.end or (starts and not at)), ()
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
