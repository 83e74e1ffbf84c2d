"""Engine interface: requests with their status and events, limits and statistics."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Literal

from proper.adapters.records import Head
from proper.adapters.slot_cache import AdapterKey, CacheCounts
from proper.errors import InputError
from proper.inference.prefix_cache import PrefixKey
from proper.inference.sampling import Logprobs, Sampler, Sampling
from proper.run_folder import Tier

Status = Literal["waiting", "running", "finished"]

Reason = Literal["stop", "length", "cancelled", "error", "lost"]
"""stop: end token; length: `max_new_tokens` reached; cancelled: by the client or at shutdown; error: a failure; lost:
the process that computed it has died, and the same request may be sent again."""


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
        task: number of the prompt's task in a run of several.
    """

    prompt: tuple[int, ...]
    user: str | None = None
    tenant: str = ""
    tier: Tier = Tier.USERS
    sampling: Sampling = field(default_factory=Sampling)
    gates: bool = False
    client: str = ""
    alternatives: int | None = None
    task: int = 0

    def require_possible(self, limit: int, embeddings: int) -> None:
        """Check that the request can be computed.

        Args:
            limit: maximum tokens of a prompt and its answer together.
            embeddings: number of token embeddings of the model; valid ids are below it.

        Raises:
            InputError: the prompt is empty, does not fit with its answer, or has a token without an embedding.
        """
        size = len(self.prompt) + self.sampling.max_new_tokens
        if not self.prompt or self.sampling.max_new_tokens < 1:
            raise InputError("a prompt and its answer have at least one token each")
        if size > limit:
            raise InputError(f"prompt and answer may have {limit} tokens together, these would have {size}")
        for token in (min(self.prompt), max(self.prompt)):
            if not 0 <= token < embeddings:
                raise InputError(f"the prompt has token {token}; the model has embeddings for 0 to {embeddings - 1}")


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


Event = Started | Token | Finished
Sink = Callable[[Event], None]
"""Callback that gets a request's events in order, ending with one `Finished`. Runs on the engine's thread: be quick."""


@dataclass(frozen=True)
class EngineLimits:
    """Batch, slot and memory limits of an engine.

    Attributes:
        rows: maximum requests that run together.
        slots: adapter slots of the bank; None takes one per row and a quarter more, for prefetching.
        prefill: maximum tokens of new prompts per step, padding included; a longer prompt is prefilled alone.
        patience: how often a request whose adapter is not loaded may be overtaken by requests whose adapter is.
        length: maximum tokens of a prompt and its answer together, for which memory is allocated; None takes the
            config's `compute.max_length`.
        prefix_bytes: budget of the prefix cache in bytes; 0 switches it off.
        flow_rows: maximum rows of one API key while other keys wait; None takes half of `rows`.
    """

    rows: int = 32
    slots: int | None = None
    prefill: int = 2048
    patience: int = 16
    length: int | None = None
    prefix_bytes: int = 64 << 20
    flow_rows: int | None = None

    @property
    def bank(self) -> int:
        """Number of slots of the bank."""
        return self.slots or self.rows + max(1, self.rows // 4)


@dataclass(frozen=True)
class EngineStats:
    """Snapshot of an engine's figures. The counters (from `steps` on) only grow.

    Attributes:
        resident: adapters in slots.
        pinned: slots in use by running requests.
        loading: adapter loads whose result has not been collected.
        prefix_bytes: size of the prefix cache.
        reused_tokens: prompt tokens taken from the prefix cache instead of being computed.
        tokens: generated tokens by tier.
        fallbacks: requests answered below their user's tier because the adapter or embedding is damaged.
        errors: requests that ended with an error.
        replicas: engines whose figures these are the sum of.
    """

    waiting: int
    running: int
    slots: int
    resident: int
    pinned: int
    loading: int
    prefix_bytes: int
    steps: int
    prompt_tokens: int
    reused_tokens: int
    tokens: dict[str, int]
    fallbacks: int
    errors: int
    adapters: CacheCounts
    replicas: int = 1


@dataclass(eq=False)
class RequestHandle:
    """A submitted request: `cancel` and `status` for its client, the rest for the engine's thread.

    Attributes:
        request: the submitted request.
        sink: receives the events.
        wake: notifies the engine's thread.
        status: "waiting" for a row, "running" in a row, or "finished".
        cancelled: whether the engine drops the request before its next step.
        head: the version of its user's record that it uses; None without a user or record.
        key: key of the adapter that it needs; None if it needs none.
        slot: slot of that adapter while the request has a row; -1 otherwise.
        fallback: why its user's adapter or embedding is not used; None if nothing is damaged.
        prefix_key: key of its row in the prefix cache; None if the row is not to be cached.
        tokens: the tokens generated so far.
    """

    request: Request
    sink: Sink
    wake: Callable[[], None]
    status: Status = "waiting"
    cancelled: bool = False
    head: Head | None = None
    key: AdapterKey | None = None
    slot: int = -1
    fallback: str | None = None
    prefix_key: PrefixKey | None = None
    tokens: list[int] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.sampler = Sampler(self.request.sampling)

    def cancel(self) -> None:
        """Remove the request from the queue or the batch before the next step; thread-safe.

        Its sink still gets `Finished`, unless it already has.
        """
        self.cancelled = True
        self.wake()

    @property
    def size(self) -> int:
        """Number of prompt tokens."""
        return len(self.request.prompt)

    @property
    def cost(self) -> int:
        """Number of tokens of the prompt and of the longest possible answer."""
        return self.size + self.request.sampling.max_new_tokens

    @property
    def flow(self) -> tuple[str, str]:
        """Flow of the request in the fair queue: (tenant, API key)."""
        return self.request.tenant, self.request.client

    @property
    def owner(self) -> tuple[str, str] | None:
        """(tenant, user) of the record that it needs; None if it needs no record."""
        if self.request.user is None or not self.uses_experts:
            return None
        return self.request.tenant, self.request.user

    @property
    def uses_experts(self) -> bool:
        """Whether the group experts are applied to the request."""
        return self.request.tier != "population"
