"""Common code of the four recipes: simulated users' interactions as token rows, evaluation on held-out answers."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from proper.data.batching import IGNORED, Batch, collate
from proper.data.demo import DemoSettings, demo_config, write_demo
from proper.data.encoder import EncodedExample, Encoder
from proper.models.answer_loss import answer_loss

Rows = dict[str, list[EncodedExample]]
"""Each user's interactions in tokens, oldest first."""


def setting(name: str, default: int) -> int:
    """Return a constant, or its value in the environment: `USERS=20 python recipes/stage1_population.py`."""
    return int(os.environ.get(name, default))


@dataclass(frozen=True)
class Interaction:
    """One interaction: a prompt, and what the user answered. The demo has one task, number 0."""

    user: str
    prompt: str
    target: str
    task: int = 0


def demo_rows(folder: Path, users: int, seed: int, encoder: Encoder) -> tuple[Rows, Rows]:
    """Simulate users in five hidden groups; return every user's history, and the newest fifth as queries."""
    settings = DemoSettings(users=users, seed=seed)
    path = write_demo(folder, settings)
    template = demo_config(path, settings)["data"]["prompt"]
    encoded: Rows = {}
    for line in path.read_text(encoding="utf-8").splitlines():
        row = json.loads(line)
        interaction = Interaction(row["user_id"], template.format_map(row), row["output"])
        encoded.setdefault(interaction.user, []).append(encoder.encode(interaction))
    cut = {user: len(rows) - math.ceil(len(rows) / 5) for user, rows in encoded.items()}
    history = {user: rows[: cut[user]] for user, rows in encoded.items()}
    return history, {user: rows[cut[user] :] for user, rows in encoded.items()}


def report(when: str, logits_of: Callable[[Batch], Tensor], queries: Rows, pad: int) -> None:
    """Print the loss and the accuracy of the held-out answers."""
    loss, accuracy = evaluate(logits_of, queries, pad)
    print(f"{when}: held-out loss {loss:.4f}, accuracy {accuracy:.4f}", flush=True)


def evaluate(logits_of: Callable[[Batch], Tensor], rows: Rows, pad: int) -> tuple[float, float]:
    """Return the mean loss per answer token (nats), and the share of answers that greedy decoding would get right.

    Greedy decoding writes an answer exactly if each of its tokens is the likeliest after the tokens before it, so one
    pass over prompt and answer gives both.
    """
    by_length = sorted((row for own in rows.values() for row in own), key=lambda row: len(row.ids))
    loss, tokens, right = 0.0, 0.0, 0
    for at in range(0, len(by_length), 64):
        batch = collate(by_length[at : at + 64], pad)
        with torch.no_grad():
            logits = logits_of(batch)
        totals, counts = answer_loss(logits, batch.labels)
        hit = (logits.argmax(-1) == batch.labels) | (batch.labels == IGNORED)
        loss, tokens, right = loss + float(totals.sum()), tokens + float(counts.sum()), right + int(hit.all(1).sum())
    return loss / tokens, right / len(by_length)
