"""Fair request queue: start-time fair queueing between flows, FIFO with bounded overtaking within a flow.

A flow is the requests of one API key of one tenant. Flows share the rows by tokens (start-time fair queueing, which
deficit round robin approximates): the flow that has received the fewest tokens is served next, and a new flow starts
level with the others. Within a flow, a request whose adapter is loaded may overtake one whose adapter is not; each
request is overtaken at most `patience` times per flow. With a single flow the queue is FIFO with this overtaking.
"""

from __future__ import annotations

import heapq
from collections import Counter, deque
from collections.abc import Callable, Hashable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Generic, Protocol, TypeVar

RECENT = 1000
"""Number of steps for which a row is reserved for the next request of a recently active flow."""


class Queued(Protocol):
    """Protocol of a queued item.

    Attributes:
        size: tokens of the prompt, computed before the first new token.
        cost: tokens of the prompt and of the longest possible answer.
        flow: the flow that the item belongs to.
    """

    @property
    def size(self) -> int: ...  # noqa: D102
    @property
    def cost(self) -> int: ...  # noqa: D102
    @property
    def flow(self) -> Hashable: ...  # noqa: D102


T = TypeVar("T", bound=Queued)


@dataclass(eq=False)
class _QueuedRequest(Generic[T]):
    item: T
    number: int
    passed: Counter[Hashable] = field(default_factory=Counter)


class RequestQueue(Generic[T]):
    """Queue of requests, fair between flows.

    Args:
        patience: how often a request may be overtaken by requests of one flow.
        flow_rows: maximum rows of a flow while others wait; None takes half of all rows.
    """

    def __init__(self, patience: int, flow_rows: int | None = None) -> None:
        self.patience, self.flow_rows = patience, flow_rows
        self._lines: dict[Hashable, deque[_QueuedRequest[T]]] = {}
        self._tags: dict[Hashable, int] = {}
        """Start tag of each flow's next request, in tokens of virtual time."""
        self._now, self._added, self._steps = 0, 0, 0
        self._seen: dict[Hashable, int] = {}

    def __len__(self) -> int:
        return sum(map(len, self._lines.values()))

    def add(self, item: T) -> None:
        """Append a request to its flow."""
        if item.flow not in self._lines:
            self._lines[item.flow] = deque()
            self._tags[item.flow] = max(self._tags.get(item.flow, 0), self._now)
        self._lines[item.flow].append(_QueuedRequest(item, self._added))
        self._added += 1

    def items(self) -> list[T]:
        """Return all requests in the order in which they will be served."""
        return [entry.item for entry in self._order()]

    def remove(self, gone: Callable[[T], bool]) -> list[T]:
        """Remove the requests for which `gone` is true, and return them."""
        left = [entry for entry in self._order() if gone(entry.item)]
        self._drop(left)
        return [entry.item for entry in left]

    def take(self, rows: int, tokens: int, ready: Callable[[T], bool], running: Sequence[T] = ()) -> list[T]:
        """Remove and return the requests that get a row now; called once per step.

        Args:
            rows: number of free rows, the most requests to take.
            tokens: prefill budget in tokens, with all prompts padded to the longest; one request may exceed it alone.
            ready: whether a request can start (its adapter is loaded); called in queue order. A ready request that
                passes the other limits is taken.
            running: the requests that have a row.
        """
        shares = self._shares(rows, running)
        taken: list[_QueuedRequest[T]] = []
        unready: list[_QueuedRequest[T]] = []
        blocked: set[Hashable] = set()
        longest = 0
        for entry in self._order():
            item, flow = entry.item, entry.item.flow
            if len(taken) == rows:
                break
            if flow in blocked or not shares.allows(flow, rows - len(taken)):
                blocked.add(flow)
                continue
            width = max(longest, item.size)
            if taken and width * (len(taken) + 1) > tokens:
                break
            if any(other.passed[flow] >= self.patience for other in unready):
                blocked.add(flow)
                continue
            if not ready(item):
                unready.append(entry)
                continue
            for other in unready:
                other.passed[flow] += 1
            taken.append(entry)
            self._charge(item)
            shares.running[flow] += 1
            longest = width
        self._drop(taken)
        return [entry.item for entry in taken]

    def _order(self) -> Iterator[_QueuedRequest[T]]:
        """Yield all entries in the order in which they would be served."""
        lines = {flow: iter(line) for flow, line in self._lines.items()}
        if len(lines) == 1:
            yield from next(iter(lines.values()))
            return
        heap = []
        for flow, line in lines.items():
            first = next(line)
            heap.append((self._tags[flow], first.number, first))
        heapq.heapify(heap)
        while heap:
            start, _, entry = heapq.heappop(heap)
            yield entry
            following = next(lines[entry.item.flow], None)
            if following is not None:
                heapq.heappush(heap, (start + entry.item.cost, following.number, following))

    def _charge(self, item: T) -> None:
        """Charge a request's cost to its flow and advance the virtual time."""
        self._now = max(self._now, self._tags[item.flow])
        self._tags[item.flow] += item.cost

    def _drop(self, gone: Sequence[_QueuedRequest[T]]) -> None:
        if not gone:
            return
        numbers = {entry.number for entry in gone}
        for flow in {entry.item.flow for entry in gone}:
            self._lines[flow] = deque(entry for entry in self._lines[flow] if entry.number not in numbers)
            if not self._lines[flow]:
                del self._lines[flow]
        if not self._lines:  # nothing waits, so no flow is behind another: virtual time restarts
            self._tags, self._now = {}, 0
        else:
            self._tags = {flow: tag for flow, tag in self._tags.items() if flow in self._lines or tag > self._now}

    def _shares(self, free: int, running: Sequence[T]) -> _Shares:
        """Record the active flows, and return the row limits of this step."""
        self._steps += 1
        rows = Counter[Hashable](item.flow for item in running)
        for flow in (*rows, *self._lines):
            self._seen[flow] = self._steps
        self._seen = {flow: step for flow, step in self._seen.items() if self._steps - step <= RECENT}
        total = free + len(running)
        limit = self.flow_rows or max(1, total // 2)
        return _Shares(rows, limit, max(1, total // 8) if total > 1 else 0, set(self._seen), set(self._lines))


@dataclass
class _Shares:
    """Row limits of the flows in one step.

    Attributes:
        running: number of rows of each flow.
        limit: maximum rows of a flow while another flow that is below this limit waits.
        spare: maximum number of rows kept free, one for each recently active flow that may send a request again.
        recent: the recently active flows.
        waiting: the flows with waiting requests.
    """

    running: Counter[Hashable]
    limit: int
    spare: int
    recent: set[Hashable]
    waiting: set[Hashable]

    def allows(self, flow: Hashable, free: int) -> bool:
        """Whether a flow may take one more of the free rows."""
        own = self.running[flow]
        if not own or len(self.recent) == 1:
            return True
        if own >= self.limit and any(self.running[other] < self.limit for other in self.waiting if other != flow):
            return False
        return free > min(self.spare, sum(other != flow and self._has_reservation(other) for other in self.recent))

    def _has_reservation(self, flow: Hashable) -> bool:
        """Whether a row is reserved for a flow's next request; a waiting one is served in queue order anyway."""
        own = self.running[flow]
        return not own or (own < self.limit and flow not in self.waiting)
