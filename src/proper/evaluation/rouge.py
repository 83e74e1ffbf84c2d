"""ROUGE-1 and ROUGE-L F-measures of words in any script.

F-measures equal those of `rouge_score` without a stemmer, to the last bit, and so do the words of ASCII text. That
package is not used because its words are runs of a to z and digits: it splits words at accents, drops other scripts,
and its import needs a home directory.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from proper.errors import DataError

OFFICIAL_RESAMPLES = 1000
"""Bootstrap samples of `rouge_score.scoring.BootstrapAggregator` by default, with which the benchmark scores."""


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
