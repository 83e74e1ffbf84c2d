"""Chat templates: messages to prompt text with the tokenizer's own template, and control tokens quoted in users' texts.

A chat template writes its control tokens and the users' contents into one text. The names of control tokens inside the
contents (`<s>`, a typed `<|im_end|>`) are quoted before the template is rendered, so that they stay ordinary text.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any, Literal, Protocol

from jinja2 import TemplateError

from proper.errors import ConfigError, InputError

MARK = "\ufdd0"
"""A Unicode noncharacter: reserved for internal use, never part of interchanged text."""

TURN = "\ufdd2"
"""A noncharacter: the begin of a message in a prompt's text (`conversations.join_turns`)."""

_CONTENT = "\ufdd1"
"""A noncharacter that stands for a message's content while a template is examined."""

DAY = datetime(2024, 7, 26)
"""The day that templates with today's date write (Llama 3, SmolLM3): prompts are the same in training and after it."""

ChatMode = Literal["auto", "on", "off"]


class Turn(Protocol):
    """A message: its role and its text."""

    @property
    def role(self) -> str: ...  # noqa: D102
    @property
    def text(self) -> str: ...  # noqa: D102


@dataclass(frozen=True)
class TextMessage:
    """A message of a conversation."""

    role: str
    text: str


def uses_chat_template(mode: ChatMode, tokenizer: Any, backbone: str) -> bool:
    """Return whether prompts use the tokenizer's chat template: `auto` means if it has one.

    Raises:
        ConfigError: `on`, and the tokenizer has no chat template.
    """
    present = bool(getattr(tokenizer, "chat_template", None))
    if mode == "on" and not present:
        raise ConfigError(f"data.chat: on, but the tokenizer of backbone {backbone!r} has no chat template")
    return present and mode != "off"


def plain_prompt(turns: Sequence[Turn]) -> str:
    """Return the prompt of a conversation without a chat template.

    A single message is the prompt unchanged, so that a chat of one message equals a completion. Several messages become
    `Role: text` lines followed by `Assistant:`.
    """
    if len(turns) == 1:
        return turns[0].text
    return "\n".join([*conversation_lines(turns), "Assistant:"])


def conversation_lines(turns: Sequence[Turn]) -> list[str]:
    """Return the messages as a model without a chat template sees them in a conversation of several."""
    return [f"{turn.role.capitalize()}: {turn.text}" for turn in turns]


def readable(prompt: str) -> str:
    """Return a prompt's text without the marks of its messages."""
    return prompt.replace(TURN, "")


class ChatFormat:
    """The chat template of a tokenizer.

    Attributes:
        before: text of a prompt of one user message before the message's content.
        after: text behind the content, up to where the assistant's answer starts.
        closing: name of the control token that ends an assistant's message; None if the template names none.
    """

    def __init__(self, tokenizer: Any, names: Iterable[str]) -> None:
        self._tokenizer, self._names = tokenizer, tuple(names)
        dated = "strftime_now" in str(tokenizer.chat_template)
        self._fixed = {"chat_template": _of_one_day(tokenizer.get_chat_template())} if dated else {}
        self.before, _, self.after = self.render([TextMessage("user", _CONTENT)]).partition(_CONTENT)
        self.closing = self._find_closing()

    def render(self, turns: Sequence[Turn]) -> str:
        """Return the prompt of a conversation, up to where the assistant's answer starts.

        Raises:
            InputError: the template does not allow these roles in this order.
        """
        return self._apply(turns, answered=False)

    def _apply(self, turns: Sequence[Turn], answered: bool) -> str:
        messages = [{"role": turn.role, "content": quote(turn.text, self._names)} for turn in turns]
        try:
            text = self._tokenizer.apply_chat_template(
                messages, tokenize=False, add_generation_prompt=not answered, **self._fixed
            )
        except (TemplateError, ValueError) as error:
            raise InputError(f"the backbone's chat template refuses these messages: {error}") from error
        return str(text)

    def _find_closing(self) -> str | None:
        turns = [TextMessage("user", "a"), TextMessage("assistant", _CONTENT)]
        _, _, rest = self._apply(turns, answered=True).partition(_CONTENT)
        found = [piece for piece, special in pieces(rest, self._names) if special]
        return found[0] if found else None


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


def _of_one_day(template: str) -> str:
    """Replace the calls for today's date, by the form that they ask for, with `DAY`."""
    return re.sub(r"strftime_now\(\s*(['\"])(.*?)\1\s*\)", lambda call: repr(DAY.strftime(call[2])), template)


def _any_of(names: Iterable[str]) -> str:
    return "|".join(re.escape(name) for name in sorted(names, key=len, reverse=True) if name)
