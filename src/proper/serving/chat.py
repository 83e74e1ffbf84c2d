"""Chat messages to prompt text, in the format of the run's training data (`data.chat`).

Only `data.chat: off` exists so far: training uses prompts without the tokenizer's chat template, so serving does too,
whether the tokenizer has one or not. A single message is the prompt unchanged, so a chat of one message equals a
completion. Several messages become `Role: text` lines followed by `Assistant:`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol


class Turn(Protocol):
    """A message: its role and its text."""

    @property
    def role(self) -> str: ...  # noqa: D102
    @property
    def text(self) -> str: ...  # noqa: D102


def chat_prompt(turns: Sequence[Turn]) -> str:
    """Return the prompt for a list of messages, in the format of `data.chat: off`."""
    if len(turns) == 1:
        return turns[0].text
    return "\n".join([*(f"{turn.role.capitalize()}: {turn.text}" for turn in turns), "Assistant:"])
