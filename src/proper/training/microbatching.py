"""Micro-batching of many users' rows: micro-batches of similar length, and the losses of their rows.

Rows are sorted by length and split at the least total cost: the cost of a micro-batch is its tokens, padding included,
plus a constant for starting it. The split changes no result beyond rounding.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace

import torch
from jaxtyping import Float
from torch import Tensor

from proper.data.batching import collate
from proper.data.encoder import EncodedExample
from proper.layers.batch_context import Mode, RowContext
from proper.models.personal import ProperModel
from proper.training.jobs import Job

MICRO_TOKENS = 4096
"""Maximum padded tokens per micro-batch; more only costs memory."""

START_TOKENS = 64
"""Fixed cost of a micro-batch, in tokens: about a thousand calls into torch, 15 ms on a CPU with proper-nano."""

SlotRow = tuple[int, int, EncodedExample]
"""A row's slot, its index in its user's batch, and the row."""


def micro_batches(work: Sequence[SlotRow], limit: int | None = None) -> Iterator[list[SlotRow]]:
    """Split rows into micro-batches at the least total cost.

    Each has at most `MICRO_TOKENS` tokens, padding included, at most `limit` if it is given, or is a single row.
    """
    most = MICRO_TOKENS if limit is None else min(MICRO_TOKENS, limit)
    rows = sorted(work, key=lambda entry: -len(entry[2].ids))
    lengths = [len(row.ids) for _, _, row in rows]
    cuts = _candidates(lengths, most)
    for start, end in _cheapest(lengths, cuts, most):
        # Keep a user's rows adjacent, so that the adapter is read and its gradient accumulated in one place.
        yield sorted(rows[start:end], key=lambda entry: entry[:2])


def padded_tokens(pieces: Sequence[Sequence[SlotRow]]) -> int:
    """Return the number of tokens that run through the model, padding included."""
    return sum(len(piece) * max(len(row.ids) for _, _, row in piece) for piece in pieces)


def row_losses(
    model: ProperModel,
    jobs: Mapping[int, Job],
    work: Sequence[SlotRow],
    mode: Mode,
    pad: int,
    generators: Sequence[torch.Generator] = (),
) -> tuple[Float[Tensor, "B"], Float[Tensor, "B"]]:
    """Return each row's summed answer loss (nats) and its number of answer tokens, from one forward pass.

    Args:
        model: the model; its bank has the adapters.
        jobs: the job of each slot.
        work: the rows of one micro-batch.
        mode: the tier that is computed.
        pad: id of the padding token.
        generators: each row's generator for dropout; empty for none.
    """
    batch = collate([row for _, _, row in work], pad, model.device)
    embedding = torch.stack([jobs[slot].embedding for slot, _, _ in work]).to(model.device)
    slots = torch.tensor([slot for slot, _, _ in work], device=model.device)
    rows = RowContext(mode, embedding=embedding, slots=slots, complete=True)
    if generators:
        rows = replace(rows, generators=tuple(generators), mask=batch.attention_mask.bool())
    return model.answer_losses(batch, rows)


@torch.no_grad()
def item_losses(model: ProperModel, jobs: Mapping[int, Job], mode: Mode, pad: int) -> dict[int, Float[Tensor, "n 2"]]:
    """Return each held-out item's summed loss (nats) and its number of answer tokens, by slot.

    Jobs without held-out items are left out.

    Args:
        model: the model; its bank has the adapters.
        jobs: the job of each slot.
        mode: the tier that is computed.
        pad: id of the padding token.
    """
    work = [(slot, at, row) for slot, job in jobs.items() for at, row in enumerate(job.held_out)]
    found = {slot: torch.zeros(len(job.held_out), 2, dtype=torch.float64) for slot, job in jobs.items()}
    for piece in micro_batches(work, model.backbone.batch_tokens):
        totals, tokens = row_losses(model, jobs, piece, mode, pad)
        for (slot, at, _), total, count in zip(piece, totals.tolist(), tokens.tolist(), strict=True):
            found[slot][at] = torch.tensor([total, count], dtype=torch.float64)
    return {slot: losses for slot, losses in found.items() if losses[:, 1].sum() > 0}


def _candidates(lengths: Sequence[int], most: int) -> list[int]:
    """Return where a micro-batch may end: where the length changes, and where rows of one length fill it."""
    cuts, start = [0], 0
    for at in range(1, len(lengths) + 1):
        changes = at == len(lengths) or lengths[at] != lengths[start]
        if changes or (at - start) % max(1, most // lengths[start]) == 0:
            cuts.append(at)
        if changes:
            start = at
    return cuts if lengths else []


def _cheapest(lengths: Sequence[int], cuts: Sequence[int], most: int) -> list[tuple[int, int]]:
    """Return the micro-batches (start, end) with the least sum of padded tokens plus `START_TOKENS` each."""
    if not cuts:
        return []
    costs, before = [0] + [0] * (len(cuts) - 1), [0] * len(cuts)
    for end in range(1, len(cuts)):
        best = None
        for start in range(end - 1, -1, -1):
            size = (cuts[end] - cuts[start]) * lengths[cuts[start]]
            if size > most and start < end - 1:
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
