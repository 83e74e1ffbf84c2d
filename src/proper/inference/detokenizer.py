"""Incremental detokenizer with stop strings: the joined pieces are the decoded answer, stripped.

A character may be spread over several tokens and a stop string over several pieces, so text that could still change is
held back. Stop strings are matched before stripping: one may be a newline at the beginning or the end of the answer.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

_BYTE = re.compile("<0x[0-9A-F]{2}>")
_CLEANED = 19
"""Trailing characters that `clean_up_tokenization_spaces` may still rewrite: it replaces ten strings in turn, and each
may reach back by its length less one (" ." by 1, " ' " by 2, " n't" by 3, ...)."""
_UNFINISHED = "\N{REPLACEMENT CHARACTER}"


class Detokenizer:
    """Decoder of one streamed answer.

    Attributes:
        stopped: whether a stop string was found; it and the text after it are not part of the answer.
    """

    def __init__(self, tokenizer: Any, stop: Sequence[str] = ()) -> None:
        self.stopped = False
        self._window = _CLEANED if _cleans_up(tokenizer) else 0
        self._tokenizer, self._stop = tokenizer, [text for text in stop if text]
        self._unseen = set(tokenizer.all_special_ids)
        self._ids: list[int] = []
        self._sent = ""

    def push(self, token: int) -> str:
        """Add a token; return the new text that can no longer change."""
        self._ids.append(token)
        raw = self._raw()
        if not self.stopped:
            pending = max((overlap(raw, stop) for stop in self._stop), default=0)
            pending = max(pending, self._window, self._open(raw))
            raw = raw[: max(0, len(raw) - pending)].rstrip(_UNFINISHED)
        return self._send(raw.strip())

    def close(self) -> str:
        """Return the text that was held back."""
        return self._send(self._raw().strip())

    def _raw(self) -> str:
        """Return the text before the first stop string, not stripped."""
        text = self._decode(self._ids)
        places = [at for stop in self._stop if (at := text.find(stop)) >= 0]
        self.stopped = bool(places)
        return text[: min(places)] if places else text

    def _decode(self, ids: list[int]) -> str:
        text: str = self._tokenizer.decode(ids, skip_special_tokens=True)
        return text

    def _open(self, text: str) -> int:
        """Return the characters of a trailing run of byte tokens, which may go on: it decodes only as a whole."""
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
    """Return whether decoding removes spaces before punctuation; many byte-level tokenizers claim it but do not."""
    if not getattr(tokenizer, "clean_up_tokenization_spaces", False):
        return False
    ids = tokenizer("a . b ' s", add_special_tokens=False).input_ids
    return bool(tokenizer.decode(ids) != tokenizer.decode(ids, clean_up_tokenization_spaces=False))


def overlap(text: str, stop: str) -> int:
    """Return the length of the longest suffix of `text` that is a proper prefix of `stop`."""
    return next((size for size in range(min(len(stop) - 1, len(text)), 0, -1) if text.endswith(stop[:size])), 0)
