"""Micro-batching: splits many users' rows into micro-batches of similar length, which run one after another.

Rows are sorted by length and split at the least total cost: the cost of a micro-batch is its tokens, padding included,
plus a constant for starting it. The split changes no result beyond rounding.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from proper.data.encoder import EncodedExample

MICRO_TOKENS = 4096
"""Maximum padded tokens per micro-batch; more only costs memory."""

START_TOKENS = 64
"""Fixed cost of a micro-batch, in tokens: about a thousand calls into torch, 15 ms on a CPU with proper-nano."""

Work = tuple[int, int, EncodedExample]
"""A row's slot, its index in its user's batch, and the row."""


def micro_batches(work: Sequence[Work]) -> Iterator[list[Work]]:
    """Split rows into micro-batches of at most `MICRO_TOKENS` padded tokens (or one row) at the least total cost."""
    rows = sorted(work, key=lambda entry: -len(entry[2].ids))
    lengths = [len(row.ids) for _, _, row in rows]
    cuts = _candidates(lengths)
    for start, end in _cheapest(lengths, cuts):
        # Keep a user's rows adjacent, so that the adapter is read and its gradient accumulated in one place.
        yield sorted(rows[start:end], key=lambda entry: entry[:2])


def padded_tokens(pieces: Sequence[Sequence[Work]]) -> int:
    """Return the number of tokens that run through the model, padding included."""
    return sum(len(piece) * max(len(row.ids) for _, _, row in piece) for piece in pieces)


def _candidates(lengths: Sequence[int]) -> list[int]:
    """Return where a micro-batch may end: where the length changes, and where rows of one length fill it."""
    cuts, start = [0], 0
    for at in range(1, len(lengths) + 1):
        changes = at == len(lengths) or lengths[at] != lengths[start]
        if changes or (at - start) % max(1, MICRO_TOKENS // lengths[start]) == 0:
            cuts.append(at)
        if changes:
            start = at
    return cuts if lengths else []


def _cheapest(lengths: Sequence[int], cuts: Sequence[int]) -> list[tuple[int, int]]:
    """Return the micro-batches (start, end) with the least sum of padded tokens plus `START_TOKENS` each."""
    if not cuts:
        return []
    costs, before = [0] + [0] * (len(cuts) - 1), [0] * len(cuts)
    for end in range(1, len(cuts)):
        best = None
        for start in range(end - 1, -1, -1):
            size = (cuts[end] - cuts[start]) * lengths[cuts[start]]
            if size > MICRO_TOKENS and start < end - 1:
                break
            cost = costs[start] + size + START_TOKENS
            if best is None or cost < best:
                best, before[end] = cost, start
        assert best is not None
        costs[end] = best
    pieces, end = [], len(cuts) - 1
    while end > 0:
        pieces.append((cuts[before[end]], cuts[end]))
        end = before[end]
    return pieces[::-1]
