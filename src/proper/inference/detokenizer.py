"""Tokens of one answer to text, piece by piece: the pieces joined are the decoded answer, stripped.

A character may be spread over tokens and a stop text over pieces, so what could still change is held back. A stop text
is looked for in the answer before it is stripped: it may be a newline at the beginning or the end. Knows nothing about
models or users.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

_BYTE = re.compile("<0x[0-9A-F]{2}>")
_CLEANED = 19
"""Characters at the end that clean-up may still rewrite: it replaces ten texts in turn, each of which may reach back by
its length less one (" ." by 1, " ' " by 2, " n't" by 3, ...)."""
_UNFINISHED = "\N{REPLACEMENT CHARACTER}"


class Detokenizer:
    """One answer as it grows.

    Attributes:
        stopped: whether a stop text came; it and what follows are not part of the answer.
    """

    def __init__(self, tokenizer: Any, stop: Sequence[str] = ()) -> None:
        self.stopped = False
        self._window = _CLEANED if _cleans_up(tokenizer) else 0
        self._tokenizer, self._stop = tokenizer, [text for text in stop if text]
        self._unseen = set(tokenizer.all_special_ids)
        self._ids: list[int] = []
        self._sent = ""

    def push(self, token: int) -> str:
        """Take a token; return the text that is certain now."""
        self._ids.append(token)
        raw = self._raw()
        if not self.stopped:
            held = max((overlap(raw, stop) for stop in self._stop), default=0)
            held = max(held, self._window, self._open(raw))
            raw = raw[: max(0, len(raw) - held)].rstrip(_UNFINISHED)
        return self._send(raw.strip())

    def close(self) -> str:
        """Return what was held back."""
        return self._send(self._raw().strip())

    def _raw(self) -> str:
        """Return the text before the first stop text, not stripped."""
        text = self._decode(self._ids)
        places = [at for stop in self._stop if (at := text.find(stop)) >= 0]
        self.stopped = bool(places)
        return text[: min(places)] if places else text

    def _decode(self, ids: list[int]) -> str:
        text: str = self._tokenizer.decode(ids, skip_special_tokens=True)
        return text

    def _open(self, text: str) -> int:
        """Return how many characters are of a run of byte tokens that may go on: it is text only if all of it is."""
        size = len(self._ids)
        while size and self._may_go_on(self._ids[size - 1]):
            size -= 1
        return 0 if size == len(self._ids) else len(text) - len(self._decode(self._ids[:size]))

    def _may_go_on(self, token: int) -> bool:
        name = self._tokenizer.convert_ids_to_tokens(token) or ""
        return token in self._unseen or _BYTE.fullmatch(name) is not None

    def _send(self, text: str) -> str:
        if len(text) <= len(self._sent):
            return ""
        piece, self._sent = text[len(self._sent) :], text
        return piece


def _cleans_up(tokenizer: Any) -> bool:
    """Return whether decoding takes spaces out before punctuation; many say so of whom it is not true (byte-level)."""
    if not getattr(tokenizer, "clean_up_tokenization_spaces", False):
        return False
    ids = tokenizer("a . b ' s", add_special_tokens=False).input_ids
    return bool(tokenizer.decode(ids) != tokenizer.decode(ids, clean_up_tokenization_spaces=False))


def overlap(text: str, stop: str) -> int:
    """Return how many characters at the end of `text` may be the beginning of `stop`."""
    return next((size for size in range(min(len(stop) - 1, len(text)), 0, -1) if text.endswith(stop[:size])), 0)
