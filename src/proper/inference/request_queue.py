"""Which of the waiting requests get a row next: fair between flows, in order of arrival within one.

A flow is the requests of one API key of one tenant. Flows share the rows by tokens (start-time fair queueing, which
deficit round robin approximates): the flow that has been given the fewest tokens goes next, and one that comes anew
starts level with the others. Within a flow, requests whose adapter is in a slot may pass those whose is not, each of
these at most `patience` times per flow. With a single flow the line is first in, first out with that passing.
Knows nothing about models, slots or time.
"""

from __future__ import annotations

import heapq
from collections import Counter, deque
from collections.abc import Callable, Hashable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Generic, Protocol, TypeVar

RECENT = 1000
"""Steps for which a row is kept free for the next request of a flow that has asked."""


class Queued(Protocol):
    """Something that waits.

    Attributes:
        size: tokens to compute before its first answer.
        cost: all of its tokens, the answer at its longest included.
        flow: whose it is.
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
    """A line of flows.

    Args:
        patience: how often a request may be passed by those of one flow.
        flow_rows: rows that a flow may hold while others wait; None takes half of them.
    """

    def __init__(self, patience: int, flow_rows: int | None = None) -> None:
        self.patience, self.flow_rows = patience, flow_rows
        self._lines: dict[Hashable, deque[_QueuedRequest[T]]] = {}
        self._tags: dict[Hashable, int] = {}
        """Where the next request of a flow starts, in tokens of virtual time."""
        self._now, self._added, self._steps = 0, 0, 0
        self._seen: dict[Hashable, int] = {}

    def __len__(self) -> int:
        return sum(map(len, self._lines.values()))

    def add(self, item: T) -> None:
        """Put at the end of its flow."""
        if item.flow not in self._lines:
            self._lines[item.flow] = deque()
            self._tags[item.flow] = max(self._tags.get(item.flow, 0), self._now)
        self._lines[item.flow].append(_QueuedRequest(item, self._added))
        self._added += 1

    def items(self) -> list[T]:
        """Return all, in the order in which they are to go."""
        return [place.item for place in self._order()]

    def remove(self, gone: Callable[[T], bool]) -> list[T]:
        """Take out those who will not wait any longer."""
        left = [place for place in self._order() if gone(place.item)]
        self._drop(left)
        return [place.item for place in left]

    def take(self, rows: int, tokens: int, ready: Callable[[T], bool], running: Sequence[T] = ()) -> list[T]:
        """Take those who go now; called once a step.

        Args:
            rows: how many at most.
            tokens: how many tokens they may have together, padded to the longest; one may always go.
            ready: whether one can go; called in order, and taken at its word.
            running: those who have a row.
        """
        shares = self._shares(rows, running)
        taken: list[_QueuedRequest[T]] = []
        unready: list[_QueuedRequest[T]] = []
        held: set[Hashable] = set()
        longest = 0
        for place in self._order():
            item, flow = place.item, place.item.flow
            if len(taken) == rows:
                break
            if flow in held or not shares.allows(flow, rows - len(taken)):
                held.add(flow)
                continue
            width = max(longest, item.size)
            if taken and width * (len(taken) + 1) > tokens:
                break
            if any(other.passed[flow] >= self.patience for other in unready):
                held.add(flow)
                continue
            if not ready(item):
                unready.append(place)
                continue
            for other in unready:
                other.passed[flow] += 1
            taken.append(place)
            self._charge(item)
            shares.running[flow] += 1
            longest = width
        self._drop(taken)
        return [place.item for place in taken]

    def _order(self) -> Iterator[_QueuedRequest[T]]:
        """Yield all in the order in which they would go."""
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
            start, _, place = heapq.heappop(heap)
            yield place
            following = next(lines[place.item.flow], None)
            if following is not None:
                heapq.heappush(heap, (start + place.item.cost, following.number, following))

    def _charge(self, item: T) -> None:
        """Have a flow pay for a request that goes."""
        self._now = max(self._now, self._tags[item.flow])
        self._tags[item.flow] += item.cost

    def _drop(self, gone: Sequence[_QueuedRequest[T]]) -> None:
        if not gone:
            return
        numbers = {place.number for place in gone}
        for flow in {place.item.flow for place in gone}:
            self._lines[flow] = deque(place for place in self._lines[flow] if place.number not in numbers)
            if not self._lines[flow]:
                del self._lines[flow]
        if not self._lines:  # there is enough for everybody: no flow owes another
            self._tags, self._now = {}, 0
        else:
            self._tags = {flow: tag for flow, tag in self._tags.items() if flow in self._lines or tag > self._now}

    def _shares(self, free: int, running: Sequence[T]) -> _Shares:
        """Note who is there, and return what each may have in this step."""
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
    """How many rows each flow may have in one step.

    Attributes:
        running: rows of each flow.
        limit: those that a flow may have while another one, with fewer, waits.
        spare: rows that are kept free, one for each flow that was there lately and may come again, no more than this.
        lately: the flows that were.
        waiting: the flows that wait.
    """

    running: Counter[Hashable]
    limit: int
    spare: int
    lately: set[Hashable]
    waiting: set[Hashable]

    def allows(self, flow: Hashable, free: int) -> bool:
        """Whether a flow may have one more of the free rows."""
        mine = self.running[flow]
        if not mine or len(self.lately) == 1:
            return True
        if mine >= self.limit and any(self.running[other] < self.limit for other in self.waiting if other != flow):
            return False
        return free > min(self.spare, sum(other != flow and self._may_come(other) for other in self.lately))

    def _may_come(self, flow: Hashable) -> bool:
        """Whether a flow's next request is to find a row; one that waits already has its turn in the line."""
        mine = self.running[flow]
        return not mine or (mine < self.limit and flow not in self.waiting)
