"""What the four recipes share: the made-up people as token rows, and how well held-out answers are predicted.

Knows nothing about layers or training.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from proper.data.batching import Batch, collate
from proper.data.demo import DemoSettings, demo_config, write_demo
from proper.data.encoder import EncodedExample, Encoder
from proper.models.personal import answer_loss

Rows = dict[str, list[EncodedExample]]
"""Each person's interactions in tokens, oldest first."""


def setting(name: str, default: int) -> int:
    """Return a constant, or what the environment has for it: `PEOPLE=20 python recipes/stage1_population.py`."""
    return int(os.environ.get(name, default))


@dataclass(frozen=True)
class Interaction:
    """One thing that a person was asked and wrote."""

    user: str
    prompt: str
    target: str


def demo_rows(folder: Path, people: int, seed: int, encoder: Encoder) -> tuple[Rows, Rows]:
    """Make up people in five hidden groups; return everybody's history, and their newest fifth as queries."""
    settings = DemoSettings(users=people, seed=seed)
    path = write_demo(folder, settings)
    template = demo_config(path, settings)["data"]["prompt"]
    written: Rows = {}
    for line in path.read_text(encoding="utf-8").splitlines():
        row = json.loads(line)
        asked = Interaction(row["user_id"], template.format_map(row), row["output"])
        written.setdefault(asked.user, []).append(encoder.encode(asked))
    cut = {user: len(rows) - math.ceil(len(rows) / 5) for user, rows in written.items()}
    history = {user: rows[: cut[user]] for user, rows in written.items()}
    return history, {user: rows[cut[user] :] for user, rows in written.items()}


def held_out(logits_of: Callable[[Batch], Tensor], rows: Rows, pad: int) -> tuple[float, float]:
    """Return the mean loss per answer token (nats), and the share of answers that greedy decoding would get right.

    Greedy decoding writes an answer exactly if each of its tokens is the likeliest after the tokens before it, so one
    pass over prompt and answer tells both.
    """
    everything = sorted((row for own in rows.values() for row in own), key=lambda row: len(row.ids))
    loss, tokens, right = 0.0, 0.0, 0
    for at in range(0, len(everything), 64):
        batch = collate(everything[at : at + 64], pad)
        with torch.no_grad():
            logits = logits_of(batch)
        totals, counts = answer_loss(logits, batch.labels)
        hit = (logits.argmax(-1) == batch.labels) | (batch.labels == -100)
        loss, tokens, right = loss + float(totals.sum()), tokens + float(counts.sum()), right + int(hit.all(1).sum())
    return loss / tokens, right / len(everything)
