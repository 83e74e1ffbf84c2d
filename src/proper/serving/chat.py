"""Messages to a prompt, written as the run's training data were (`data.chat`).

`off`, the only way there is so far: training writes prompts as they stand, without the tokenizer's chat template, so
serving does too, whether the tokenizer has one or not. One message is the prompt as it stands, so a chat of one message
is a completion. Several are written as `Role: text` lines ending in `Assistant:`. Knows nothing about models.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol


class Turn(Protocol):
    """Who said what."""

    @property
    def role(self) -> str: ...  # noqa: D102
    @property
    def text(self) -> str: ...  # noqa: D102


def chat_prompt(turns: Sequence[Turn]) -> str:
    """Return the prompt of a chat as a run with `data.chat: off` reads it."""
    if len(turns) == 1:
        return turns[0].text
    return "\n".join([*(f"{turn.role.capitalize()}: {turn.text}" for turn in turns), "Assistant:"])
