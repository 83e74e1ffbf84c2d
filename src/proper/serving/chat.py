"""Messages to a prompt: by the tokenizer's own template where it has one, by a plain rule otherwise.

The rule: one message is the prompt as it stands, so a chat of one message is a completion. Several are written as
`Role: text` lines ending in `Assistant:`. Knows nothing about models.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

from jinja2 import TemplateError

from proper.data.markup import quote, special_names
from proper.serving.refusals import Refusal


class Turn(Protocol):
    """Who said what."""

    @property
    def role(self) -> str: ...  # noqa: D102
    @property
    def text(self) -> str: ...  # noqa: D102


def chat_prompt(turns: Sequence[Turn], tokenizer: Any) -> tuple[str, bool]:
    """Return the prompt, and whether it holds the tokenizer's start tokens already.

    Names of special tokens in the messages are quoted then (`data.markup`): `Encoder.filled` takes them for text.

    Raises:
        Refusal: the tokenizer's template does not take these messages.
    """
    if not getattr(tokenizer, "chat_template", None):
        return plain(turns), False
    roles = {"developer": "system"}
    names = special_names(tokenizer)
    messages = [{"role": roles.get(turn.role, turn.role), "content": quote(turn.text, names)} for turn in turns]
    try:
        text: str = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    except (TemplateError, ValueError) as error:
        raise Refusal(400, f"messages: the model's chat template refuses them: {error}", param="messages") from error
    return text, True


def plain(turns: Sequence[Turn]) -> str:
    """Write messages without a template."""
    if len(turns) == 1:
        return turns[0].text
    return "\n".join([*(f"{turn.role.capitalize()}: {turn.text}" for turn in turns), "Assistant:"])
