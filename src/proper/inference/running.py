"""A request inside the engine, from the line to its row, and the engine's settings and figures.

Knows nothing about what the engine does with them.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

from proper.adapters.async_slot_cache import AdapterKey, CacheCounts
from proper.adapters.records import Head
from proper.inference.prefix_cache import PrefixKey
from proper.inference.requests import Request, Sink
from proper.inference.sampling import Sampler


@dataclass(frozen=True)
class EngineLimits:
    """How much the engine does at once.

    Attributes:
        rows: requests that run together.
        slots: adapters in the bank; None takes one per row and a quarter more, for loading ahead.
        prefill: tokens of new prompts, padding included, in one step; a longer prompt goes alone.
        patience: how often a request whose adapter is not there may be passed by others whose is.
        length: tokens that a prompt and its answer may have together, for which memory is taken; the config's
            `compute.max_length` if None.
        prefix_bytes: for keys and values that the same person's next prompt may begin with; 0 keeps none.
        flow_rows: rows that the requests of one API key may hold while other keys wait; half of `rows` if None.
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
        """Slots of the bank."""
        return self.slots or self.rows + max(1, self.rows // 4)


@dataclass(frozen=True)
class EngineStats:
    """What the engine is doing and has done. The counters (from `steps` on) only grow.

    Attributes:
        pinned: slots that running requests hold.
        prefix_bytes: of the prefixes that are kept.
        reused_tokens: those of the prompts' tokens that did not have to be computed.
        tokens: new tokens by tier.
        fallbacks: requests answered below their user's tier because the adapter is damaged.
        errors: requests that ended because something failed.
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


class RequestHandle:
    """A request's way back: `cancel` gives up its place or its row before the next step. For any thread."""

    def __init__(self, request: Request, sink: Sink, wake: Callable[[], None]) -> None:
        self.request, self.sink, self.cancelled = request, sink, False
        self._wake = wake

    def cancel(self) -> None:
        """Let go; the sink still gets `Finished`, unless it had it."""
        self.cancelled = True
        self._wake()


@dataclass(eq=False)
class RunningRequest:
    """A request inside the engine.

    Attributes:
        head: the record of its user that it is tied to; None for nobody's.
        key: the adapter it needs; None if it needs none.
        slot: where that adapter is while the request has a row.
        fallback: why it does without its user's adapter.
        origin: whose its row's keys and values are; None if they are not to be kept.
        said: its new tokens so far.
    """

    ticket: RequestHandle
    sampler: Sampler
    head: Head | None = None
    key: AdapterKey | None = None
    slot: int = -1
    fallback: str | None = None
    origin: PrefixKey | None = None
    said: list[int] = field(default_factory=list)

    @property
    def request(self) -> Request:
        """What was asked."""
        return self.ticket.request

    @property
    def size(self) -> int:
        """Tokens of the prompt."""
        return len(self.request.prompt)

    @property
    def cost(self) -> int:
        """Tokens of the prompt and of the longest answer."""
        return self.size + self.request.sampling.max_new_tokens

    @property
    def flow(self) -> tuple[str, str]:
        """Between which the rows are shared: tenant and API key."""
        return self.request.tenant, self.request.client

    @property
    def owner(self) -> tuple[str, str] | None:
        """Tenant and user of the record it needs; None for nobody's."""
        if self.request.user is None or not self.grouped:
            return None
        return self.request.tenant, self.request.user

    @property
    def grouped(self) -> bool:
        """Whether experts take part in its answer."""
        return self.request.tier != "population"
