"""Escaping of special-token names in users' texts: `<s>` in HTML or a typed `<|im_end|>` never becomes a control token.

A chat template writes its own special tokens and the users' contents into one text. Names inside contents are therefore
quoted before the template is rendered: a mark character, which no text may contain, follows their first character.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from typing import Any

MARK = "\ufdd0"
"""A Unicode noncharacter: reserved for internal use, never part of interchanged text."""


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
