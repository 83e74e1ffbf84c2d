"""What the engine is asked and what it says back, event by event. Knows nothing about how answers come about."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Literal

from proper.errors import InputError
from proper.inference.sampling import Logprobs, Sampling

Tier = Literal["users", "groups", "population"]

Reason = Literal["stop", "length", "cancelled", "error"]
"""The end token came; max_new_tokens are there; somebody cancelled; something failed."""


@dataclass(frozen=True)
class Request:
    """A prompt to go on from.

    Attributes:
        prompt: its tokens.
        user: whose model answers; None or an unknown user gets the group model with the mean embedding.
        tenant: whose user.
        tier: the highest that may answer; "groups" leaves the user's adapter out, "population" the experts too.
        sampling: how tokens are drawn, and how many at most. The seed is this request's own.
        gates: whether its tokens tell which experts they came from.
        client: the API key that asks; the rows are shared between tenants' keys.
        alternatives: how many likely tokens each of its tokens tells beside its own log-probability; None for neither.
    """

    prompt: tuple[int, ...]
    user: str | None = None
    tenant: str = ""
    tier: Tier = "users"
    sampling: Sampling = field(default_factory=Sampling)
    gates: bool = False
    client: str = ""
    alternatives: int | None = None


@dataclass(frozen=True)
class Started:
    """A request has a row.

    Attributes:
        tier: which tier answers.
        version: the user's version in force until the request ends; None for nobody's.
        fallback: why a tier below the user's own answers; None if it does not.
    """

    tier: str
    version: int | None
    fallback: str | None = None


@dataclass(frozen=True)
class Token:
    """One more token.

    Attributes:
        gates: each expert's gate where the token was drawn, the mean over modules; None unless the request wants them
            and experts answer it.
        logprobs: its log-probability and the likeliest tokens; None unless the request wants them.
    """

    id: int
    gates: tuple[float, ...] | None = None
    logprobs: Logprobs | None = None


@dataclass(frozen=True)
class Finished:
    """Nothing more comes. The end token is not among the tokens."""

    reason: Reason
    error: str | None = None


def require_possible(request: Request, limit: int, embeddings: int) -> None:
    """See that a request can be computed.

    Args:
        request: what is asked.
        limit: tokens that a prompt and its answer may have together.
        embeddings: tokens that the model has embeddings for, from 0 on.

    Raises:
        InputError: the prompt is empty, does not fit with its answer, or has a token without an embedding.
    """
    size = len(request.prompt) + request.sampling.max_new_tokens
    if not request.prompt or request.sampling.max_new_tokens < 1:
        raise InputError("a prompt and its answer have at least one token each")
    if size > limit:
        raise InputError(f"prompt and answer may have {limit} tokens together, these would have {size}")
    for odd in (min(request.prompt), max(request.prompt)):
        if not 0 <= odd < embeddings:
            raise InputError(f"the prompt has token {odd}, and the model has embeddings for 0 to {embeddings - 1}")


Event = Started | Token | Finished
Sink = Callable[[Event], None]
"""Called from the engine's thread, in order, ending with one `Finished`. It must be quick."""
