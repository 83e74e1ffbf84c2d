"""Continuous-batching engine for mixed users: each step generates one token for every running row.

    step:  accept and cancel requests -> start adapter loads -> decode one token per row -> prefill requests whose
           adapters are loaded

New rows are prefilled together and join the running batch. Keys and values are personal: a row never reuses those of
another user, not even for the same prompt (`prefix_cache.py`). A request keeps one version of its user's adapter until
it ends. An error ends the request that caused it; if no request caused it, `step` raises and the engine has to be
closed. The engine works on tokens, not on text.
"""

from __future__ import annotations

import threading
from collections import Counter, deque
from dataclasses import replace

import torch

from proper.adapters.async_slot_cache import CacheCounts
from proper.adapters.records import Head
from proper.adapters.store import AdapterStore
from proper.errors import ProperError
from proper.inference.adapter_manager import AdapterManager
from proper.inference.batch import Drawn, RunningBatch
from proper.inference.model import PersonalizedModel
from proper.inference.prefix_cache import PrefixCache, PrefixKey
from proper.inference.request_queue import RequestQueue
from proper.inference.requests import (
    EngineLimits,
    EngineStats,
    Event,
    Finished,
    Reason,
    Request,
    RequestHandle,
    RunningRequest,
    Sink,
    Started,
    require_possible,
)
from proper.inference.sampling import Sampler
from proper.run_folder import Tier


class Engine:
    """Engine of one model. Methods not marked thread-safe are for the thread that runs the steps.

    The engine fills the model's bank. Until `close`, neither the model's own `generate` and `score` nor another engine
    may be used on the model.

    Args:
        model: the model that answers.
        limits: batch, slot and memory limits; the defaults if None.
        strict: raise every error, damaged adapters included, from `step`. A server (not strict) fails only the request
            that the error belongs to.

    Attributes:
        limit: maximum tokens of a prompt and its answer together.
        changed: condition that is notified when a request, cancellation or load needs a step.
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
        """Queue a request and return its handle; the engine's thread calls `sink` with the events. Thread-safe.

        Raises:
            InputError: see `check`.
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
        """Check that a request can be computed; thread-safe. Raises InputError, see `requests.require_possible`."""
        require_possible(request, self.limit, self.model.model.backbone.embeddings)

    def forget(self, tenant: str, user: str) -> None:
        """Wipe a user's adapters from the bank once no row uses them, and drop the user's prefixes; thread-safe."""
        with self.changed:
            self._forget.append((tenant, user))
            self.changed.notify_all()

    def recheck(self) -> None:
        """Forget all cached users who are no longer in their store; thread-safe.

        Another process may have deleted them.
        """
        with self.changed:
            self._recheck = True
            self.changed.notify_all()

    def store(self, tenant: str) -> AdapterStore:
        """Return a tenant's store, which the first call opens; thread-safe.

        Raises:
            ProperError: the run has no users.
        """
        return self._loading.store(tenant)

    def wake(self) -> None:
        """Notify the threads that wait on `changed`; thread-safe."""
        with self.changed:
            self.changed.notify_all()

    def settle(self) -> None:
        """Wait for all running loads, so that the next prefill depends on the requests only and not on timing."""
        with self.changed:
            self.changed.wait_for(lambda: self._loading.settled)

    @property
    def idle(self) -> bool:
        """Whether every submitted request has finished."""
        return not self._open

    @property
    def blocked(self) -> bool:
        """Whether a step has nothing to do until a load ends or a request is submitted or cancelled."""
        loading = self._loading
        if len(self._batch) or self._inbox or self._forget or self._recheck or loading.finished:
            return False
        if len(self._waiting) and not loading.underway:
            return False  # a row that ended with its first token has freed the slot or row that these requests need
        return not any(guest.ticket.cancelled or loading.ready(guest) for guest in self._waiting.items())

    def stats(self) -> EngineStats:
        """Return a snapshot of the engine's figures; thread-safe."""
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
        """Finish every request as cancelled, or as failed with `error`, and give the model its own bank back."""
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
        """Accept and cancel requests, decode one token for every row, then prefill new rows.

        Raises:
            StoreError: an adapter is damaged, if `strict`; any other error that ends a request is then raised too.
            Exception: an error that belongs to no request; the engine cannot go on.
        """
        self._take_in()
        self._let_go()
        # Loads overlap with decoding, so that a load shorter than a decoding step delays no request.
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
        """Return the prefix cache key of a request's row under this record; None if the row is not to be cached."""
        if head is None or guest.owner is None or not self._prefixes.budget:
            return None
        return PrefixKey.of(*guest.owner, head, adapter=guest.slot >= 0)

    def _hand_out(self, drawn: list[Drawn], first: int) -> None:
        """Append the drawn tokens to the rows from `first` on; rows that have ended or failed leave the batch."""
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
        try:  # the row of a user who was updated or deleted meanwhile is not cached
            if guest.origin is not None and guest.origin == self._origin(guest, self._loading.head(guest)):
                self._batch.keep(row)
        except Exception:  # without the cached prefix the next prompt is slower, but no answer is lost
            self._counts["unkept"] += 1
        self._batch.leave(row)
        self._loading.release(guest)
        self._say(guest.ticket, Finished(reason))

    def _lose(self, row: int, error: Exception) -> None:
        """End a row whose computation failed; its user's adapter and prefixes may be corrupt, so they are dropped.

        The adapter is loaded again for the user's next request.
        """
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

    def _tier(self, guest: RunningRequest) -> Tier:
        if self.model.served is None or self.model.stage in (Tier.BASE, Tier.POPULATION):
            return self.model.stage
        if not guest.grouped:
            return Tier.POPULATION
        if guest.head is None:
            return Tier.NONE
        return Tier.USERS if guest.slot >= 0 else Tier.GROUPS

    def _say(self, ticket: RequestHandle, event: Event) -> None:
        if isinstance(event, Finished):
            with self.changed:
                del self._open[ticket]
        try:
            ticket.sink(event)
        except Exception:
            # The receiver is gone: count it and cancel the request, so that the next step frees its row.
            self._counts["deaf"] += 1
            ticket.cancelled = True
