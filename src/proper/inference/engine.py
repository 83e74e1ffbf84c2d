"""Continuous batching for mixed users: a loop whose every step adds one token to every row, whoever it belongs to.

    step:  take in what came, let rows go -> start loads -> one token per row -> seat those whose adapters are there

New rows are prefilled together and join the running ones. Keys and values are personal: a row gets none of another
person's, not even for the same prompt (`prefixes.py`). A request keeps the version of its user's adapter from when it
was accepted to its end. What fails ends the request that it belongs to; where it belongs to none, `step` raises and the
engine has to be closed.
Knows nothing about text, HTTP or time.
"""

from __future__ import annotations

import threading
from collections import Counter, deque
from dataclasses import replace
from typing import TYPE_CHECKING

import torch

from proper.adapters.async_slot_cache import CacheCounts
from proper.adapters.records import Head
from proper.adapters.store import AdapterStore
from proper.errors import ProperError
from proper.inference.adapter_manager import AdapterManager
from proper.inference.batch import Drawn, RunningBatch
from proper.inference.prefix_cache import PrefixCache, PrefixKey
from proper.inference.request_queue import RequestQueue
from proper.inference.requests import Event, Finished, Reason, Request, Sink, Started, require_possible
from proper.inference.running import EngineLimits, EngineStats, RequestHandle, RunningRequest
from proper.inference.sampling import Sampler

if TYPE_CHECKING:
    from proper.inference.personalized import PersonalizedModel


class Engine:
    """One model, many requests. `submit` is for any thread, everything else for the one that runs the steps.

    It fills the model's bank. From here to `close` the model's own `generate` and `score` may not be used, nor may
    another engine; afterwards they may.

    Args:
        model: whose answers.
        limits: how much at once; the defaults if None.
        strict: raise what goes wrong, damaged adapters too, from `step`, where a server goes on for everybody else.

    Attributes:
        limit: tokens that a prompt and its answer may have together.
    """

    def __init__(self, model: PersonalizedModel, limits: EngineLimits | None = None, *, strict: bool = False) -> None:
        limits = limits or EngineLimits()
        self.model, self.limits, self.limit = model, limits, limits.length or model.config.compute.max_length
        positions = model.model.backbone.positions
        if positions is not None:
            self.limit = min(self.limit, positions)
        self._strict = strict
        self.changed = threading.Condition()
        self._loading = AdapterManager(model, limits.bank, self.wake, strict)
        self._prefixes = PrefixCache(limits.prefix_bytes)
        self._inbox: deque[RequestHandle] = deque()
        self._forget: deque[tuple[str, str]] = deque()
        self._recheck = False
        self._waiting: RequestQueue[RunningRequest] = RequestQueue(limits.patience, limits.flow_rows)
        self._batch = RunningBatch(model, limits.rows, self.limit, self._prefixes)
        self._open: dict[RequestHandle, None] = {}
        self._closed = False
        self._counts: Counter[str] = Counter()
        self._tokens: Counter[str] = Counter()

    def submit(self, request: Request, sink: Sink) -> RequestHandle:
        """Accept a request; the sink is told about it from the thread that runs the steps.

        Raises:
            InputError: as from `check`.
            ProperError: the engine is closed.
        """
        self.check(request)
        ticket = RequestHandle(request, sink, self.wake)
        with self.changed:
            if self._closed:
                raise ProperError("the engine is closed")
            self._open[ticket] = None
            self._inbox.append(ticket)
            self.changed.notify_all()
        return ticket

    def check(self, request: Request) -> None:
        """See that a request can be computed; for any thread. Raises InputError as `requests.require_possible`."""
        require_possible(request, self.limit, self.model.model.backbone.embeddings)

    def forget(self, tenant: str, user: str) -> None:
        """Wipe a user's adapters from the bank once nothing runs on them, and drop their prefixes; for any thread."""
        with self.changed:
            self._forget.append((tenant, user))
            self.changed.notify_all()

    def recheck(self) -> None:
        """Forget those users of whom something is kept and who are not in their store any more; for any thread.

        Another process may have deleted them.
        """
        with self.changed:
            self._recheck = True
            self.changed.notify_all()

    def store(self, tenant: str) -> AdapterStore:
        """Return a tenant's store, opened when it is first asked for; for any thread.

        Raises:
            ProperError: the run has no users.
        """
        return self._loading.store(tenant)

    def wake(self) -> None:
        """Have whoever waits on `changed` look again; for any thread."""
        with self.changed:
            self.changed.notify_all()

    def settle(self) -> None:
        """Wait for the loads in hand: what is done then depends on nothing but what was asked."""
        with self.changed:
            self.changed.wait_for(lambda: self._loading.settled)

    @property
    def idle(self) -> bool:
        """Whether no request is left without its end."""
        return not self._open

    @property
    def blocked(self) -> bool:
        """Whether the next step has nothing to do before a load ends or something is handed in or cancelled."""
        loading = self._loading
        if len(self._batch) or self._inbox or self._forget or self._recheck or loading.finished:
            return False
        if len(self._waiting) and not loading.underway:
            return False  # a row that ended with its first token has freed what they wait for
        return not any(guest.ticket.cancelled or loading.ready(guest) for guest in self._waiting.items())

    def stats(self) -> EngineStats:
        """Return a snapshot; for any thread."""
        residents, counts = self._loading.residents, self._counts
        return EngineStats(
            waiting=len(self._waiting) + len(self._inbox),
            running=len(self._batch),
            slots=residents.bank.slots if residents is not None else 0,
            resident=len(residents) if residents is not None else 0,
            pinned=residents.pinned if residents is not None else 0,
            loading=self._loading.underway,
            prefix_bytes=self._prefixes.bytes,
            steps=counts["steps"],
            prompt_tokens=counts["prompt"],
            reused_tokens=self._batch.reused,
            tokens=dict(self._tokens),
            fallbacks=self._loading.fallbacks,
            errors=counts["errors"],
            adapters=replace(residents.counts) if residents is not None else CacheCounts(),
        )

    def close(self, error: str | None = None) -> None:
        """End every request, cancelled or with an error, and the loading thread; the bank is the model's own again."""
        with self.changed:
            self._closed = True
            left = list(self._open)
        self._counts["errors"] += len(left) if error is not None else 0
        for ticket in left:
            self._say(ticket, Finished("cancelled") if error is None else Finished("error", error))
        self._inbox.clear()
        self._waiting.remove(lambda _: True)
        self._batch.guests.clear()
        self._loading.close()

    @torch.no_grad()
    def step(self) -> None:
        """Give every row one more token, after letting go and taking in.

        Raises:
            StoreError: an adapter is damaged, if `strict`; and then also whatever else ends a request.
            Exception: something failed that belongs to no request; the engine cannot go on.
        """
        self._take_in()
        self._let_go()
        # Loads go on while the rows compute: who needs one does not wait a step longer than who does not.
        self._loading.ahead(self._waiting.items())
        self._decode()
        if self._strict:
            self.settle()
        self._loading.collect(self._waiting.items())
        self._prefill()
        self._counts["steps"] += 1

    def _decode(self) -> None:
        if len(self._batch):
            self._hand_out(self._batch.decode(), 0)

    def _prefill(self) -> None:
        seated = self._seat()
        if seated:
            self._counts["prompt"] += sum(guest.size for guest in seated)
            drawn, failed = self._batch.prefill(seated)
            for guest, error in failed:
                self._loading.release(guest)
                self._fail(guest.ticket, error)
            self._hand_out(drawn, len(self._batch) - len(drawn))
            if not drawn:
                self._batch.require_backbone()

    def _take_in(self) -> None:
        if self._recheck:
            self._recheck = False
            kept = self._loading.owners() | self._prefixes.owners()
            self._forget.extend(owner for owner in kept if self._loading.is_gone(*owner))
        while self._forget:
            tenant, user = self._forget.popleft()
            self._loading.forget(tenant, user)
            self._prefixes.forget(tenant, user)
        while self._inbox:
            ticket = self._inbox.popleft()
            try:
                guest = RunningRequest(ticket, Sampler(ticket.request.sampling))
                self._loading.accept(guest)
            except Exception as error:  # a store that cannot be read, say
                self._fail(ticket, error)
                continue
            self._waiting.add(guest)

    def _let_go(self) -> None:
        for guest in self._waiting.remove(lambda guest: guest.ticket.cancelled):
            self._say(guest.ticket, Finished("cancelled"))
        for row in reversed(range(len(self._batch))):
            if self._batch.guests[row].ticket.cancelled:
                self._leave(row, "cancelled")

    def _seat(self) -> list[RunningRequest]:
        free = self.limits.rows - len(self._batch)
        seated = self._waiting.take(free, self.limits.prefill, self._loading.ready, self._batch.guests)
        for guest in seated:
            self._loading.take(guest)
            guest.origin = self._origin(guest, guest.head)
            version = None if guest.head is None else guest.head.version
            self._say(guest.ticket, Started(self._tier(guest), version, guest.fallback))
        return seated

    def _origin(self, guest: RunningRequest, head: Head | None) -> PrefixKey | None:
        """Return whose keys and values a row's are under this record; None for those that are not kept."""
        if head is None or guest.owner is None or not self._prefixes.budget:
            return None
        return PrefixKey.of(*guest.owner, head, adapter=guest.slot >= 0)

    def _hand_out(self, drawn: list[Drawn], first: int) -> None:
        """Give rows from `first` on their next token; those that are done, or have none, leave."""
        guests = self._batch.guests[first : first + len(drawn)]
        for row in reversed(range(len(guests))):
            guest, token = guests[row], drawn[row]
            if isinstance(token, Exception):
                self._lose(first + row, token)
                continue
            if token.id in self.model.encoder.ends:
                self._leave(first + row, "stop")
                continue
            guest.said.append(token.id)
            self._tokens[self._tier(guest)] += 1
            self._say(guest.ticket, token)
            if len(guest.said) == guest.request.sampling.max_new_tokens:
                self._leave(first + row, "length")
        if drawn and all(isinstance(token, Exception) for token in drawn):
            self._batch.require_backbone()

    def _leave(self, row: int, reason: Reason) -> None:
        guest = self._batch.guests[row]
        try:  # who was updated or deleted meanwhile leaves nothing
            if guest.origin is not None and guest.origin == self._origin(guest, self._loading.head(guest)):
                self._batch.keep(row)
        except Exception:  # a store or memory that fails costs the next prompt some time, and no answer
            self._counts["unkept"] += 1
        self._batch.leave(row)
        self._loading.release(guest)
        self._say(guest.ticket, Finished(reason))

    def _lose(self, row: int, error: Exception) -> None:
        """End a row that has no next token. What it was computed with is not trusted any more: it is loaded again."""
        guest = self._batch.guests[row]
        self._batch.leave(row)
        self._loading.release(guest)
        if guest.owner is not None:
            self._loading.forget(*guest.owner)
            self._prefixes.forget(*guest.owner)
        self._fail(guest.ticket, error)

    def _fail(self, ticket: RequestHandle, error: Exception) -> None:
        """End one request as failed.

        Raises:
            Exception: the error, if `strict`.
        """
        self._counts["errors"] += 1
        self._say(ticket, Finished("error", f"{type(error).__name__}: {error}"))
        if self._strict:
            raise error

    def _tier(self, guest: RunningRequest) -> str:
        if self.model.cache is None or self.model.stage in ("base", "population"):
            return self.model.stage
        if not guest.grouped:
            return "population"
        if guest.head is None:
            return "none"
        return "users" if guest.slot >= 0 else "groups"

    def _say(self, ticket: RequestHandle, event: Event) -> None:
        if isinstance(event, Finished):
            with self.changed:
                del self._open[ticket]
        try:
            ticket.sink(event)
        except Exception:
            # Whoever asked is gone; the others' rows go on. It is counted, and the row is free before the next step.
            self._counts["deaf"] += 1
            ticket.cancelled = True
