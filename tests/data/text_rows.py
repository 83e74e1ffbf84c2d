"""Rows of text, and a chat template for tests of the encoder."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


@dataclass(frozen=True)
class Row:
    prompt: str
    target: str
    user: str = "ann"
    task: int = 0


def make_rows(lengths: dict[str, int]) -> list[dict[str, Any]]:
    """Rows of users with this many interactions each, all different, in order of time."""
    return [
        {"user_id": user, "input": f"{user} {n}", "output": f"answer{n % 4}", "timestamp": n, "item_id": f"{user}{n}"}
        for user, length in lengths.items()
        for n in range(length)
    ]
