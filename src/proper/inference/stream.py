"""Tokens of one answer to text, piece by piece: the pieces joined are the decoded answer, stripped.

A character may be spread over tokens and a stop text over pieces, so what could still change is held back. Knows
nothing about models or users.
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
        text, certain = self._text(), None
        if not self.stopped:
            held = max((overlap(text, stop) for stop in self._stop), default=0)
            certain = text[: len(text) - held].rstrip(_UNFINISHED).rstrip()
        return self._send(text if certain is None else certain)

    def close(self) -> str:
        """Return what was held back."""
        return self._send(self._text())

    def _text(self) -> str:
        text: str = self._tokenizer.decode(self._ids, skip_special_tokens=True).strip()
        places = [at for stop in self._stop if (at := text.find(stop)) >= 0]
        if places:
            self.stopped = True
            text = text[: min(places)].strip()
        return text

    def _send(self, text: str) -> str:
        if len(text) <= len(self._sent) or not text.startswith(self._sent):
            return ""
        piece, self._sent = text[len(self._sent) :], text
        return piece


def overlap(text: str, stop: str) -> int:
    """Return how many characters at the end of `text` may be the beginning of `stop`."""
    return next((size for size in range(min(len(stop) - 1, len(text)), 0, -1) if text.endswith(stop[:size])), 0)
