"""Words of texts in any script, for ROUGE, for retrieval and for counts."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterator
from functools import lru_cache
from typing import Literal

_LATIN, _IDENTIFIERS = re.compile(r"[a-z0-9]+"), re.compile(r"[a-z0-9_]+")
_UNBROKEN = re.compile(r"\S+")

_SPACELESS = (
    *("CJK ", "IDEOGRAPHIC ", "HIRAGANA ", "KATAKANA", "BOPOMOFO ", "YI ", "NUSHU ", "TANGUT "),
    *("THAI ", "LAO ", "KHMER ", "MYANMAR ", "TAI ", "NEW TAI ", "JAVANESE ", "BALINESE "),
)
"""Unicode name prefixes of letters whose scripts put no space between words."""


def latin_words(text: str) -> list[str]:
    """Return the lower-case runs of a to z and digits, which are the words of `rouge_score`."""
    return _LATIN.findall(text.lower())


def words(text: str) -> list[str]:
    """Return the words of a text in any script: case-folded runs of letters, marks and digits.

    In scripts without spaces each letter with its marks is a word, as is usual for Chinese. A symbol such as an emoji
    is a word too, since an answer may consist of it alone. ASCII text has the words of `latin_words`.
    """
    return latin_words(text) if text.isascii() else [*_words(_folded(text))]


def search_words(text: str) -> list[str]:
    """Return the words by which a text is found: those of `words`, with identifiers (`max_length`) in one piece."""
    return _IDENTIFIERS.findall(text.lower()) if text.isascii() else [*_words(_folded(text), joining="_")]


def word_starts(text: str) -> list[int]:
    """Return where each word of a text starts, punctuation included: behind spaces, or at letters without spaces."""
    starts = []
    for found in _UNBROKEN.finditer(text):
        letters = [at for at in range(*found.span()) if is_spaceless(text[at])]
        starts += [found.start(), *letters[1:]]
    return starts


def is_spaceless(letter: str) -> bool:
    """Return whether a character is a letter of a script without spaces between words."""
    return not letter.isascii() and letter.isalpha() and _kind(letter) == "alone"


def _folded(text: str) -> str:
    """Normalize Unicode variants of equal text: composed and decomposed accents, widths, case."""
    return unicodedata.normalize("NFKC", unicodedata.normalize("NFKC", text).casefold())


def _words(text: str, joining: str = "") -> Iterator[str]:
    word = ""
    for character in text:
        kind = "letter" if character in joining else _kind(character)
        if kind == "letter" and not (word and _kind(word[0]) == "alone") or kind == "mark" and word:
            word += character
        elif kind != "joiner":
            if word:
                yield word
            word = "" if kind == "gap" else character
    if word:
        yield word


@lru_cache(maxsize=1 << 14)
def _kind(character: str) -> Literal["letter", "mark", "alone", "joiner", "gap"]:
    """Classify a character: part of a word, a word by itself, ignored (joiners, direction marks), or a gap."""
    category = unicodedata.category(character)
    name = unicodedata.name(character, "")
    if category[0] == "M":
        # A variation selector (coloured or plain emoji) does not change the word.
        return "joiner" if name.startswith("VARIATION SELECTOR") else "mark"
    if category == "So" or (category[0] in "LN" and name.startswith(_SPACELESS)):
        return "alone"
    if category[0] in "LN":
        return "letter"
    # A zero-width space separates words; other format characters occur inside words.
    return "joiner" if category == "Cf" and character != "\u200b" else "gap"
