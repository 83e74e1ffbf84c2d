"""What chat and completions reply with: OpenAI's shapes, whole and streamed, and who answered.

A key that OpenAI's schema requires is there even where it is null: fields without a default are always sent, others
only where they are set (`dump`). Knows nothing about how answers come about.
"""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel

End = Literal["stop", "length"]


class Extras(BaseModel):
    """Who answered: in every reply and every piece of a stream.

    Attributes:
        tier: "users" (the user's own adapter), "groups" (the user's embedding), "none" (nobody's), "population" (no
            experts); "base" of a run that has come no further.
        version: the user's version that answered; absent for nobody's.
        fallback: why a lower tier than the user's own answered; absent if it did not.
        gates: for each token of the reply, or of this piece of a stream, the gate of each of the E experts at the place
            where the token was drawn, the mean over modules: E numbers that sum to 1. Absent unless asked for, and
            where no experts answer.
    """

    tier: str
    version: int | None = None
    fallback: str | None = None
    gates: list[list[float]] | None = None


class Usage(BaseModel):
    """Tokens of a request."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int


class LikelyToken(BaseModel):
    """A token and its log-probability (nats); `bytes` is null where the token is not whole characters."""

    token: str
    logprob: float
    bytes: list[int] | None


class ToldToken(LikelyToken):
    """A token of an answer, with the likeliest tokens at its place."""

    top_logprobs: list[LikelyToken]


class ChatLogprobs(BaseModel):
    """The log-probabilities of a chat's tokens."""

    content: list[ToldToken]
    refusal: None


class TextLogprobs(BaseModel):
    """The log-probabilities of a completion's tokens; `text_offset` counts characters of the tokens before each."""

    tokens: list[str]
    token_logprobs: list[float]
    top_logprobs: list[dict[str, float]]
    text_offset: list[int]


class ChatAnswer(BaseModel):
    """A message that answers."""

    role: Literal["assistant"]
    content: str
    refusal: None


class ChatDelta(BaseModel):
    """A piece of a message; the first says whose."""

    role: Literal["assistant"] | None = None
    content: str


class ChatChoice(BaseModel):
    """The answer of a chat."""

    index: int
    message: ChatAnswer
    logprobs: ChatLogprobs | None
    finish_reason: End


class ChatPiece(BaseModel):
    """A piece of the answer of a chat."""

    index: int
    delta: ChatDelta
    logprobs: ChatLogprobs | None
    finish_reason: End | None


class TextChoice(BaseModel):
    """One answer of a completion, or a piece of it."""

    index: int
    text: str
    logprobs: TextLogprobs | None
    finish_reason: End | None


class Reply(BaseModel):
    """What chat and completions reply with, streamed or not.

    Attributes:
        usage: of a whole reply, and of the last piece of a stream that was asked to include it; null in the other
            pieces of such a stream.
    """

    id: str
    object: Literal["chat.completion", "chat.completion.chunk", "text_completion"]
    created: int
    model: str
    choices: list[ChatChoice] | list[ChatPiece] | list[TextChoice]
    usage: Usage | None = None
    proper: Extras | None = None


def dump(reply: Reply) -> dict[str, Any]:
    """Return the reply's JSON: what was set, null or not."""
    return reply.model_dump(exclude_unset=True)
