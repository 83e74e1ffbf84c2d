"""Tokens of one answer to text, piece by piece: the pieces joined are the decoded answer, stripped.

A character may be spread over tokens and a stop text over pieces, so what could still change is held back. A stop text
is looked for in the answer before it is stripped: it may be a newline at the beginning or the end. Knows nothing about
models or users.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

_UNFINISHED = "\N{REPLACEMENT CHARACTER}"


class TextStream:
    """One answer as it grows.

    Attributes:
        stopped: whether a stop text came; it and what follows are not part of the answer.
    """

    def __init__(self, tokenizer: Any, stop: Sequence[str] = ()) -> None:
        self.stopped = False
        self._tokenizer, self._stop = tokenizer, [text for text in stop if text]
        self._ids: list[int] = []
        self._sent = ""

    def push(self, token: int) -> str:
        """Take a token; return the text that is certain now."""
        self._ids.append(token)
        raw = self._raw()
        if not self.stopped:
            held = max((overlap(raw, stop) for stop in self._stop), default=0)
            raw = raw[: len(raw) - held].rstrip(_UNFINISHED)
        return self._send(raw.strip())

    def close(self) -> str:
        """Return what was held back."""
        return self._send(self._raw().strip())

    def _raw(self) -> str:
        """Return the text before the first stop text, not stripped."""
        text: str = self._tokenizer.decode(self._ids, skip_special_tokens=True)
        places = [at for stop in self._stop if (at := text.find(stop)) >= 0]
        self.stopped = bool(places)
        return text[: min(places)] if places else text

    def _send(self, text: str) -> str:
        if len(text) <= len(self._sent) or not text.startswith(self._sent):
            return ""
        piece, self._sent = text[len(self._sent) :], text
        return piece


def overlap(text: str, stop: str) -> int:
    """Return how many characters at the end of `text` may be the beginning of `stop`."""
    return next((size for size in range(min(len(stop) - 1, len(text)), 0, -1) if text.endswith(stop[:size])), 0)
