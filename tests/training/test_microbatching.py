"""Rows cut into pieces: each row once, within the budget, at the least cost there is."""

from __future__ import annotations

import itertools
import random

from hypothesis import given, settings
from hypothesis import strategies as st

from proper.data.encoder import EncodedExample
from proper.training import microbatching
from proper.training.microbatching import SlotRow, micro_batches, padded_tokens


def rows(lengths: list[int]) -> list[SlotRow]:
    return [(at % 3, at // 3, EncodedExample("u", tuple(range(length)), 1)) for at, length in enumerate(lengths)]


def cost(pieces: list[list[SlotRow]]) -> int:
    return padded_tokens(pieces) + microbatching.START_TOKENS * len(pieces)


def cheapest(work: list[SlotRow]) -> int:
    """Every way to cut the sorted rows, one after another."""
    ordered = sorted(work, key=lambda entry: -len(entry[2].ids))
    best = None
    for cuts in itertools.product([False, True], repeat=len(ordered) - 1):
        pieces, piece = [], [ordered[0]]
        for cut, entry in zip(cuts, ordered[1:], strict=True):
            if cut:
                pieces.append(piece)
                piece = []
            piece.append(entry)
        pieces.append(piece)
        fits = all(len(p) * len(p[0][2].ids) <= microbatching.MICRO_TOKENS or len(p) == 1 for p in pieces)
        if fits and (best is None or cost(pieces) < best):
            best = cost(pieces)
    assert best is not None
    return best


@given(lengths=st.lists(st.integers(1, 2000), min_size=1, max_size=8))
@settings(max_examples=60)
def test_the_cut_is_the_cheapest(lengths: list[int]) -> None:
    # A budget may force a cut inside a run of one length; then the first rows of the run fill a piece.
    lengths = list(dict.fromkeys(lengths))
    work = rows(lengths)
    pieces = list(micro_batches(work))
    assert cost(pieces) == cheapest(work)
    assert sorted(entry[:2] for piece in pieces for entry in piece) == sorted(entry[:2] for entry in work)


def test_little_padding_in_a_full_step() -> None:
    """Lengths as in the movie ratings, 32 users with 4 rows each: the shortest rows of the real sets."""
    pick = random.Random(0)
    for _ in range(20):
        work = rows([max(8, round(pick.gauss(38, 8))) for _ in range(128)])
        pieces = list(micro_batches(work))
        assert 1 - sum(len(row.ids) for _, _, row in work) / padded_tokens(pieces) <= 0.1


def test_a_users_rows_lie_side_by_side_in_a_piece() -> None:
    (piece,) = micro_batches(rows([9, 9, 9, 9, 9, 9, 9]))
    assert [slot for slot, _, _ in piece] == [0, 0, 0, 1, 1, 2, 2]


def test_nothing_to_cut() -> None:
    assert list(micro_batches([])) == [] and padded_tokens([]) == 0
