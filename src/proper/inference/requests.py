"""Engine interface: `Request`, and the events Started, Token and Finished that the engine sends to its sink."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Literal

from proper.errors import InputError
from proper.inference.sampling import Logprobs, Sampling
from proper.run_folder import Tier

Reason = Literal["stop", "length", "cancelled", "error"]
"""stop: end token; length: `max_new_tokens` reached; cancelled: by the client or at shutdown; error: a failure."""


@dataclass(frozen=True)
class Request:
    """A prompt to continue for one user.

    Attributes:
        prompt: token ids.
        user: the user whose adapter answers; None or an unknown user gets the group model with the mean embedding.
        tenant: the tenant of the user.
        tier: the highest tier that may answer; GROUPS skips the user's adapter, POPULATION the experts as well.
        sampling: sampling parameters and the maximum number of new tokens. The seed is this request's own.
        gates: whether its tokens carry the expert gates.
        client: the API key of the request; rows are shared fairly between the (tenant, API key) pairs.
        alternatives: number of top log-probabilities sent with each token's own; None sends no log-probabilities.
    """

    prompt: tuple[int, ...]
    user: str | None = None
    tenant: str = ""
    tier: Tier = Tier.USERS
    sampling: Sampling = field(default_factory=Sampling)
    gates: bool = False
    client: str = ""
    alternatives: int | None = None


@dataclass(frozen=True)
class Started:
    """Event: a request has a row in the running batch.

    Attributes:
        tier: the tier that answers.
        version: version of the user's record that the request uses until it ends; None without a record.
        fallback: why a tier below the user's own answers; None if the user's own tier answers.
    """

    tier: str
    version: int | None
    fallback: str | None = None


@dataclass(frozen=True)
class Token:
    """Event: one generated token.

    Attributes:
        id: the token id.
        gates: gate of each expert at the position that predicted the token, mean over modules; None unless the request
            asks for gates and experts are applied to it.
        logprobs: its log-probability and the top tokens; None unless the request asks for them.
    """

    id: int
    gates: tuple[float, ...] | None = None
    logprobs: Logprobs | None = None


@dataclass(frozen=True)
class Finished:
    """Event: the request has ended; no event follows. The end token is not sent as a token."""

    reason: Reason
    error: str | None = None


def require_possible(request: Request, limit: int, embeddings: int) -> None:
    """Check that a request can be computed.

    Args:
        request: the request.
        limit: maximum tokens of a prompt and its answer together.
        embeddings: number of token embeddings of the model; valid ids are below it.

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
"""Callback that gets a request's events in order, ending with one `Finished`. Runs on the engine's thread: be quick."""
