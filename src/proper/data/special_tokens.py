"""Names of special tokens inside users' texts: `<s>` in HTML or a typed `<|im_end|>` is text, never a control token.

A chat template writes its own special tokens into one text with the users' contents. So names inside contents are
quoted before the template is filled: a mark, which no text may hold, follows their first character. Knows nothing about
models or messages.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from typing import Any

MARK = "\ufdd0"
"""A Unicode noncharacter: reserved for use inside one program, never part of a text."""


def special_names(tokenizer: Any) -> dict[str, int]:
    """Return the ids of a tokenizer's special tokens by name; the unknown token, which ordinary text makes, is none."""
    found = dict(zip(tokenizer.all_special_tokens, tokenizer.all_special_ids, strict=True))
    added = getattr(tokenizer, "added_tokens_decoder", {})
    found |= {token.content: number for number, token in added.items() if token.special}
    return {str(name): number for name, number in found.items() if number != getattr(tokenizer, "unk_token_id", None)}


def quote(text: str, names: Iterable[str]) -> str:
    """Mark the names in a user's text, so that `pieces` does not take them for the template's."""
    text = text.replace(MARK, "")
    pattern = _any_of(name for name in names if len(name) > 1)
    return re.sub(pattern, lambda found: found[0][0] + MARK + found[0][1:], text) if pattern else text


def pieces(text: str, names: Iterable[str]) -> Iterator[tuple[str, bool]]:
    """Cut a filled template into (piece, whether it is a special token's name); quoted names are ordinary text."""
    pattern = _any_of(names)
    for at, piece in enumerate(re.split(f"({pattern})", text) if pattern else [text]):
        if piece:
            yield piece.replace(MARK, ""), at % 2 == 1


def cut_names(text: str, names: Iterable[str]) -> list[str]:
    """Cut a text after the first character of every name in it, so that no part holds a whole one."""
    return [part for part in quote(text, names).split(MARK) if part]


def _any_of(names: Iterable[str]) -> str:
    return "|".join(re.escape(name) for name in sorted(names, key=len, reverse=True) if name)
