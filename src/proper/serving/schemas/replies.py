"""Pydantic schemas of chat and completion replies: OpenAI's formats, whole and streamed, plus the field `proper`.

A key that OpenAI's schema requires is present even if it is null: fields without a default are always sent, others
only if they are set (`dump`).
"""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel

End = Literal["stop", "length"]


class ProperDetails(BaseModel):
    """Which tier answered; in every reply and every chunk of a stream.

    Attributes:
        tier: "users" (the user's own adapter), "groups" (the user's embedding), "none" (the mean user embedding),
            "population" (no experts); "base" for a run without a trained stage.
        version: the version of the user that answered; absent for the tier "none".
        fallback: why a lower tier than the user's own answered; absent if the user's own tier answered.
        gates: for each token of the reply, or of this chunk of a stream, the gates of the E experts at the position
            where the token was sampled, averaged over modules: E numbers that sum to 1. Absent unless requested, and
            where no experts answer.
    """

    tier: str
    version: int | None = None
    fallback: str | None = None
    gates: list[list[float]] | None = None


class Usage(BaseModel):
    """Token counts of a request."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int


class TopLogprob(BaseModel):
    """A token and its log-probability (nats); `bytes` is null if the token is not whole characters."""

    token: str
    logprob: float
    bytes: list[int] | None


class TokenLogprob(TopLogprob):
    """A token of an answer, with the likeliest tokens at its position."""

    top_logprobs: list[TopLogprob]


class ChatLogprobs(BaseModel):
    """The log-probabilities of a chat's tokens."""

    content: list[TokenLogprob]
    refusal: None


class TextLogprobs(BaseModel):
    """The log-probabilities of a completion's tokens; `text_offset` counts the characters before each token."""

    tokens: list[str]
    token_logprobs: list[float]
    top_logprobs: list[dict[str, float]]
    text_offset: list[int]


class ChatMessage(BaseModel):
    """The assistant's message."""

    role: Literal["assistant"]
    content: str
    refusal: None


class ChatDelta(BaseModel):
    """A piece of the assistant's message; only the first has `role`."""

    role: Literal["assistant"] | None = None
    content: str


class ChatChoice(BaseModel):
    """The answer to a chat request."""

    index: int
    message: ChatMessage
    logprobs: ChatLogprobs | None
    finish_reason: End


class ChatChunkChoice(BaseModel):
    """A chunk of the answer to a chat request."""

    index: int
    delta: ChatDelta
    logprobs: ChatLogprobs | None
    finish_reason: End | None


class TextChoice(BaseModel):
    """One answer to a completion request, or a chunk of it."""

    index: int
    text: str
    logprobs: TextLogprobs | None
    finish_reason: End | None


class Reply(BaseModel):
    """The reply to a chat or completion request, or a chunk of a stream.

    Attributes:
        usage: token counts, in a whole reply and in the last chunk of a stream with `include_usage`; null in the other
            chunks of such a stream.
    """

    id: str
    object: Literal["chat.completion", "chat.completion.chunk", "text_completion"]
    created: int
    model: str
    choices: list[ChatChoice] | list[ChatChunkChoice] | list[TextChoice]
    usage: Usage | None = None
    proper: ProperDetails | None = None


def dump(reply: Reply) -> dict[str, Any]:
    """Return the reply's JSON: the fields that were set, null or not."""
    return reply.model_dump(exclude_unset=True)
