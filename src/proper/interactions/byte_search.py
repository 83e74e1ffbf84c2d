"""Search of streams of bytes for user ids and for fingerprints; see `fingerprints`.

An id counts where it is not part of a longer word, of another user's id, or of other users' texts. An id of digits
alone is in too many places by chance, and so is one of fewer than four bytes in binary files: there it counts only as a
whole value (in quotes, a table's cell, a CSV field).
"""

from __future__ import annotations

import base64
import html
import json
import re
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple
from urllib.parse import quote

import numpy as np

from proper.interactions.file_contents import CHUNK
from proper.interactions.fingerprints import MAX_PRINT_BYTES, WINDOW, Kind, Print, digest, heads

_OVERLAP, _MARGIN = 4096, 1024
_SHORT_ID = 4
_AROUND, _MAX_PATTERNS = 16, 1000
_PLAIN_END, _PLAIN_START = re.compile(rb"[A-Za-z0-9 ,.]+$"), re.compile(rb"[A-Za-z0-9 ,.]+")
_WORD = rb"[A-Za-z0-9_]"
_BEFORE, _AFTER = rb"(?<=[\x00\"'>,;\t\n])", rb"(?=[\x00\"'<,;\t\r\n]|$)"
_MIN_ENCODED = 6


class Hit(NamedTuple):
    """A find: `kind` is "id", "text" or "tensor"; `source` numbers the text or tensor; `at` is the byte."""

    kind: str
    source: int
    at: int


@dataclass
class Search:
    """Target of a search: one user's id, and prints with one salt.

    Args:
        user: the id.
        others: ids of other users, for ids that are part of longer ones.
        prints: the prints; `drop` removes those that other users' texts have as well.
        salt: the salt of the prints.
    """

    user: str
    others: Iterable[str] = ()
    prints: Sequence[Print] = ()
    salt: bytes = bytes(32)
    _by_head: dict[int, list[Print]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self._patterns = [re.compile(pattern) for pattern in dict.fromkeys(_patterns(self.user, _is_short(self.user)))]
        in_text = dict.fromkeys(_patterns(self.user, self.user.isdigit()))
        self._in_text = [re.compile(pattern) for pattern in in_text]
        self._loose = _loose_pattern(self.user)
        self._longer = [
            other.encode("utf-8", "surrogatepass") for other in self.others if self.user in other and other != self.user
        ]
        self._index()

    @property
    def whole_values_only(self) -> bool:
        """Whether the id counts only as a whole value, at least in binary files."""
        return _is_short(self.user)

    def _index(self) -> None:
        by_head = defaultdict[int, list[Print]](list)
        for each in self.prints:
            by_head[each.head].append(each)
        self._by_head = dict(by_head)
        self._table = np.zeros(1 << 24, dtype=bool)
        self._table[list(by_head)] = True

    def drop(self, pieces: Iterable[tuple[Kind, int, int]]) -> None:
        """Remove the prints of these pieces (kind, source, piece)."""
        gone = set(pieces)
        self.prints = [each for each in self.prints if (each.kind, each.source, each.piece) not in gone]
        self._index()

    def ids(self, data: bytes, *, joined: bool = False) -> Iterator[int]:
        """Yield where the id is in `data`; `joined` if values stand side by side, as in a page of SQLite."""
        patterns = self._patterns if b"\0" in data[:CHUNK] else self._in_text
        patterns = [*patterns, *([self._loose] if joined and self._loose else [])]
        for pattern in patterns:
            for found in pattern.finditer(data):
                if not self._is_inside_another(data, found.start(), found.end()):
                    yield found.start()

    def _is_inside_another(self, data: bytes, start: int, end: int) -> bool:
        for other in self._longer:
            around = data[max(0, start - len(other)) : end + len(other)]
            at = around.find(other)
            while at >= 0:
                first = max(0, start - len(other)) + at
                if first <= start and end <= first + len(other):
                    return True
                at = around.find(other, at + 1)
        return False

    def matches(self, data: bytes) -> Iterator[tuple[int, Print]]:
        """Yield where a print's piece is in `data`, and the print."""
        if not self._by_head or len(data) < WINDOW:
            return
        for shift in range(WINDOW):
            count = (len(data) - shift) // WINDOW
            found = heads(np.frombuffer(data, "<u8", count, shift), self.salt)
            for index in np.flatnonzero(self._table[found]):
                at = shift + WINDOW * int(index)
                for each in self._by_head[int(found[index])]:
                    piece = data[at : at + each.length]
                    if len(piece) == each.length and digest(piece, self.salt) == each.digest:
                        yield at, each

    def scan(self, pieces: Iterable[bytes], *, joined: bool = False) -> set[Hit]:
        """Return all hits in a stream."""
        hits, before, start = set[Hit](), b"", 0
        stream = iter(pieces)
        piece = next(stream, None)
        while piece is not None:
            following = next(stream, None)
            data = before + piece
            # What decides whether an id is part of a longer one may lie in the piece before or after.
            low = _MARGIN if start else 0
            high = len(data) - _MARGIN if following is not None else len(data)
            hits |= {Hit("id", 0, start + at) for at in self.ids(data, joined=joined) if low <= at < high}
            hits |= {Hit(found.kind, found.source, start + at) for at, found in self.matches(data)}
            before = data[-_OVERLAP:]
            start += len(data) - len(before)
            piece = following
        return hits

    def shared(self, pieces: Iterable[bytes]) -> set[tuple[Kind, int, int]]:
        """Return the pieces that a stream of other users' texts has too: they do not tell whose a text is."""
        found, before = set[tuple[Kind, int, int]](), b""
        for piece in pieces:
            data = before + piece
            found |= {(each.kind, each.source, each.piece) for _, each in self.matches(data)}
            self._learn(data)
            before = data[-MAX_PRINT_BYTES:]
        return found

    def _learn(self, data: bytes) -> None:
        """Remember where other users' texts have the id as a word, with what is around it."""
        for pattern in self._in_text:
            for found in pattern.finditer(data):
                left = _PLAIN_END.search(data[max(0, found.start() - _AROUND) : found.start()])
                right = _PLAIN_START.match(data[found.end() : found.end() + _AROUND])
                around = (left[0] if left else b"") + found[0] + (right[0] if right else b"")
                if len(around) > len(found[0]) and len(self._longer) < _MAX_PATTERNS and around not in self._longer:
                    self._longer.append(around)


def _is_short(user: str) -> bool:
    return len(user.encode("utf-8", "surrogatepass")) < _SHORT_ID or user.isdigit()


def _forms(user: str) -> Iterator[bytes]:
    """Yield the encodings of an id in a text: UTF-8, JSON, HTML and URL."""
    plain = user.encode("utf-8", "surrogatepass")
    yield plain
    yield json.dumps(user)[1:-1].encode()
    yield html.escape(user).encode("utf-8", "surrogatepass")
    yield quote(plain, safe="").encode()


def _patterns(user: str, whole_values: bool) -> Iterator[bytes]:
    for form in _forms(user):
        if whole_values:
            yield _BEFORE + re.escape(form) + _AFTER
        else:
            yield rb"(?<!" + _WORD + rb")" + re.escape(form) + rb"(?!" + _WORD + rb")"
    plain = user.encode("utf-8", "surrogatepass")
    if len(plain) >= _MIN_ENCODED and not _is_short(user):
        yield re.escape(user.encode("utf-16-le", "surrogatepass"))
        yield re.escape(plain.hex().encode())
        for before in range(3):
            coded = base64.b64encode(bytes(before) + plain)[(0, 2, 3)[before] : (before + len(plain)) * 8 // 6]
            yield re.escape(coded)


def _loose_pattern(user: str) -> re.Pattern[bytes] | None:
    """Return a pattern for an id beside other values without anything between; None if it is too short for that."""
    plain = user.encode("utf-8", "surrogatepass")
    return re.compile(re.escape(plain)) if len(plain) >= _MIN_ENCODED and not _is_short(user) else None
