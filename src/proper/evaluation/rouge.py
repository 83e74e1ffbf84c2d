"""ROUGE-1 and ROUGE-L F-measures with a tokenization for all scripts.

F-measures equal those of `rouge_score` without a stemmer, to the last bit, and so does the tokenization of ASCII text.
That package is not used because its words are runs of a to z and digits: it splits words at accents, drops other
scripts, and its import needs a home directory.
"""

from __future__ import annotations

import re
import unicodedata
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from functools import lru_cache
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from proper.errors import DataError

OFFICIAL_RESAMPLES = 1000
"""Bootstrap samples of `rouge_score.scoring.BootstrapAggregator` by default, with which the benchmark scores."""

Words = Callable[[str], list[str]]

_LATIN = re.compile(r"[a-z0-9]+")

_SPACELESS = (
    *("CJK ", "IDEOGRAPHIC ", "HIRAGANA ", "KATAKANA", "BOPOMOFO ", "YI ", "NUSHU ", "TANGUT "),
    *("THAI ", "LAO ", "KHMER ", "MYANMAR ", "TAI ", "NEW TAI ", "JAVANESE ", "BALINESE "),
)
"""Unicode name prefixes of letters whose scripts put no space between words."""


def official_words(text: str) -> list[str]:
    """Return the words of a text as `rouge_score`, and so the benchmark's scorer, tokenizes it."""
    return _LATIN.findall(text.lower())


def words(text: str) -> list[str]:
    """Return the words of a text in any script: case-folded runs of letters, marks and digits.

    In scripts without spaces each letter with its marks is a word, as is usual for Chinese. A symbol such as an emoji
    is a word too, since an answer may consist of it alone. ASCII text has the words of `official_words`.
    """
    return official_words(text) if text.isascii() else [*_words(_folded(text))]


def _folded(text: str) -> str:
    """Normalize Unicode variants of equal text: composed and decomposed accents, widths, case."""
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


def rouge_1(target: Sequence[str], answer: Sequence[str]) -> float:
    """Return the ROUGE-1 F-measure: shared words, counted with repeats."""
    return _f_measure((Counter(target) & Counter(answer)).total(), len(target), len(answer))


def rouge_l(target: Sequence[str], answer: Sequence[str]) -> float:
    """Return the ROUGE-L F-measure: the longest common subsequence of words."""
    return _f_measure(_common(target, answer), len(target), len(answer))


def _common(one: Sequence[str], other: Sequence[str]) -> int:
    """Return the length of the longest common subsequence, bit-parallel with one bit per word of `one` (Hyyro 2004)."""
    bits: dict[str, int] = {}
    for index, word in enumerate(one):
        bits[word] = bits.get(word, 0) | 1 << index
    full = (1 << len(one)) - 1
    unused = full
    for word in other:
        hit = unused & bits.get(word, 0)
        unused = ((unused + hit) | (unused - hit)) & full
    return len(one) - unused.bit_count()


def _f_measure(shared: int, target: int, answer: int) -> float:
    precision, recall = shared / max(answer, 1), shared / max(target, 1)
    return 2 * precision * recall / (precision + recall) if shared else 0.0


def rouge_official(values: NDArray[np.float64], seed: int) -> float:
    """Return the official script's aggregate of ROUGE values: the median of bootstrapped means, not the mean.

    Draws are those of `rouge_score.scoring.BootstrapAggregator` after `numpy.random.seed(seed)`, for one score type.
    """
    if len(values) == 0:
        raise DataError("no ROUGE values to aggregate")
    # The aggregator uses numpy's legacy generator, whose stream differs from that of default_rng.
    draws = np.random.RandomState(seed)
    means = [values[draws.choice(np.arange(len(values)), size=len(values))].mean() for _ in range(OFFICIAL_RESAMPLES)]
    return float(np.percentile(means, 50))
