"""Users with simple habits, for tests of updates and of drift: what they say, and how to look at their records."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import yaml

from proper.adapters.store import AdapterStore, UserRecord
from proper.api import Model
from proper.data.encoder import EncodedExample
from proper.data.histories import TextExample

HABIT = {"small": "red", "large": "blue", "quiet": "green"}
"""What the user answers to the last word."""
OTHER = {"small": "green", "large": "red", "quiet": "blue"}
FIRST = ["old", "new", "loud", "round"]


def lessons(habit: dict[str, str], start: int, count: int) -> list[dict[str, Any]]:
    """Interactions by a habit; no two have the same id."""
    words = list(habit)
    return [
        {
            "id": f"{start + at}",
            "prompt": f"{FIRST[(start + at) % 4]} {words[(start + at) % 3]}",
            "target": habit[words[(start + at) % 3]],
            "timestamp": start + at,
        }
        for at in range(count)
    ]


def permuted(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The same rows with their answers at random."""
    answers = [row["target"] for row in rows]
    random.Random(1).shuffle(answers)
    return [{**row, "target": answer} for row, answer in zip(rows, answers, strict=True)]


def junk(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The same rows with one answer that is none."""
    return [{**row, "target": "round loud round loud round"} for row in rows]


def with_update(run: Path, **changed: Any) -> None:
    """Change settings of `users.update` in a run's config."""
    raw = yaml.safe_load((run / "config.yaml").read_text(encoding="utf-8"))
    raw["users"]["update"] |= changed
    (run / "config.yaml").write_text(yaml.safe_dump(raw), encoding="utf-8")


def record(folder: Path, user: str, version: int | None = None) -> UserRecord:
    store = AdapterStore(folder / "users")
    found = store.get(user, version)
    store.close()
    assert found is not None
    return found


def same(one: UserRecord, other: UserRecord) -> bool:
    tensors, others = one.adapter or {}, other.adapter or {}
    return (
        (one.tier, one.metadata) == (other.tier, other.metadata)
        and one.embedding.equal(other.embedding)
        and tensors.keys() == others.keys()
        and all(tensor.equal(others[name]) for name, tensor in tensors.items())
    )


def example(row: dict[str, Any]) -> TextExample:
    return TextExample(0, "new", row["prompt"], row["target"], None, None, 0)


def encoded(model: Model, row: dict[str, Any]) -> EncodedExample:
    return model.personalized.encoder.encode(example(row))
