"""Seeded draws of users: resamples for the bootstrap, and swaps of two methods' answers for the permutation test.

Both come in chunks that fit in memory, whose size does not change the draws. Shapes: U users, N resamples or swaps.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import lru_cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

from proper.evaluation.metrics import FloatArray

_CELLS = 1 << 22  # maximum numbers in one chunk of resamples
_KEPT_CELLS = 1 << 25  # maximum numbers of resamples that are kept for the next call, of 2 bytes each


def resampled(draws: np.random.Generator, count: int, size: int) -> FloatArray:
    """Return how often each of `count` units is in each of `size` resamples, `(size, count)`."""
    return draws.multinomial(count, np.full(count, 1.0 / count), size=size).astype(np.float64)


def user_resamples(count: int, resamples: int, seed: int, width: int) -> Iterator[FloatArray]:
    """Yield `resampled` of `count` users in chunks for rows of `width` numbers; the chunks do not change the draws."""
    if count * resamples <= _KEPT_CELLS:
        kept, at = _kept_resamples(count, resamples, seed), 0
        for size in _pieces(resamples, width):
            yield kept[at : at + size].astype(np.float64)
            at += size
        return
    draws = np.random.default_rng(seed)
    for size in _pieces(resamples, width):
        yield resampled(draws, count, size)


# Drawing costs far more than what is computed with the draws, and every metric, comparison and method of the same
# users has the same ones. Slices come one after the other, so few draws have to be kept.
@lru_cache(maxsize=2)
def _kept_resamples(count: int, resamples: int, seed: int) -> NDArray[np.unsignedinteger[Any]]:
    """Return all resamples of `count` users, `(resamples, count)`, in the smallest type that holds `count`."""
    draws, kind = np.random.default_rng(seed), np.min_scalar_type(count)
    pieces = [resampled(draws, count, size).astype(kind) for size in _pieces(resamples, count)]
    kept = np.concatenate(pieces)
    kept.flags.writeable = False
    return kept


def _pieces(count: int, width: int) -> Iterator[int]:
    """Yield chunk sizes that split `count` rows of `width` numbers into chunks that fit in memory."""
    size = max(1, _CELLS // max(1, width))
    for start in range(0, count, size):
        yield min(size, count - start)


def all_swaps(users: int) -> Iterator[FloatArray]:
    """Yield, at once, all ways to swap two methods for some of the users: 0 or 1 each, `(2 ** users, users)`."""
    codes = np.arange(2**users)
    yield ((codes[:, None] >> np.arange(users)) & 1).astype(np.float64)


def random_swaps(users: int, draws: int, seed: int, width: int) -> Iterator[FloatArray]:
    """Yield random swaps, 0 or 1 for each user, `(N, users)`, in chunks for rows of `width` numbers."""
    random = np.random.default_rng(seed)
    for size in _pieces(draws, users + width):
        yield random.integers(0, 2, size=(size, users)).astype(np.float64)
