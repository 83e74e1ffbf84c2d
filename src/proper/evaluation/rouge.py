"""ROUGE-1 and ROUGE-L: what an answer and the true one have in common, in words of any script.

The F-measures are those of `rouge_score` without a stemmer, to the last bit, and so are the words of ASCII text. That
package's words are runs of a to z and digits: it cuts words at accents and sees nothing of other scripts, and its
import needs a home directory. Knows nothing about queries.
"""

from __future__ import annotations

import re
import unicodedata
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from functools import lru_cache
from typing import Literal

Words = Callable[[str], list[str]]

_LATIN = re.compile(r"[a-z0-9]+")

_SPACELESS = (
    *("CJK ", "IDEOGRAPHIC ", "HIRAGANA ", "KATAKANA", "BOPOMOFO ", "YI ", "NUSHU ", "TANGUT "),
    *("THAI ", "LAO ", "KHMER ", "MYANMAR ", "TAI ", "NEW TAI ", "JAVANESE ", "BALINESE "),
)
"""How the Unicode names of letters begin whose scripts put no space between words."""


def official_words(text: str) -> list[str]:
    """Return the words that `rouge_score` sees, as the benchmark's own scorer uses it."""
    return _LATIN.findall(text.lower())


def words(text: str) -> list[str]:
    """Return the words of a text in any script: runs of letters, marks and digits, without case.

    Where a script has no spaces each letter is a word with its marks, as in usual scores for Chinese. So is a symbol
    such as an emoji: an answer may be nothing else. ASCII text has the words of `official_words`.
    """
    return official_words(text) if text.isascii() else [*_words(_folded(text))]


def _folded(text: str) -> str:
    """Make equal what only looks different in code: composed and decomposed accents, widths, case."""
    return unicodedata.normalize("NFKC", unicodedata.normalize("NFKC", text).casefold())


def _words(text: str) -> Iterator[str]:
    word = ""
    for character in text:
        kind = _kind(character)
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
    """Say what a character does: part of a word, a word of its own, nothing (joiners, direction), or a gap."""
    category = unicodedata.category(character)
    name = unicodedata.name(character, "")
    if category[0] == "M":
        # Whether an emoji asks to be shown in colours does not make it another one.
        return "joiner" if name.startswith("VARIATION SELECTOR") else "mark"
    if category == "So" or (category[0] in "LN" and name.startswith(_SPACELESS)):
        return "alone"
    if category[0] in "LN":
        return "letter"
    # A zero-width space is a space; other format characters stand inside words.
    return "joiner" if category == "Cf" and character != "\u200b" else "gap"


def rouge_1(target: Sequence[str], answer: Sequence[str]) -> float:
    """Return the F-measure of shared words, counted with repeats."""
    return _f_measure((Counter(target) & Counter(answer)).total(), len(target), len(answer))


def rouge_l(target: Sequence[str], answer: Sequence[str]) -> float:
    """Return the F-measure of the longest common subsequence of words."""
    return _f_measure(_common(target, answer), len(target), len(answer))


def _common(one: Sequence[str], other: Sequence[str]) -> int:
    """Return the length of the longest common subsequence, a bit per word of `one` (Hyyro 2004)."""
    places: dict[str, int] = {}
    for place, word in enumerate(one):
        places[word] = places.get(word, 0) | 1 << place
    full = (1 << len(one)) - 1
    unused = full
    for word in other:
        hit = unused & places.get(word, 0)
        unused = ((unused + hit) | (unused - hit)) & full
    return len(one) - unused.bit_count()


def _f_measure(shared: int, target: int, answer: int) -> float:
    precision, recall = shared / max(answer, 1), shared / max(target, 1)
    return 2 * precision * recall / (precision + recall) if shared else 0.0
