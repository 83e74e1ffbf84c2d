"""Continuous batching for mixed users: a loop whose every step adds one token to every row, whoever it belongs to.

    step:  take in what came, let rows go -> start loads -> one token per row -> seat those whose adapters are there

New rows are prefilled together and join the running ones. Keys and values are personal: a row gets none of another
person's, not even for the same prompt (`prefixes.py`). A request keeps the version of its user's adapter from when it
was accepted to its end.
Knows nothing about text, HTTP or time.
"""

from __future__ import annotations

import threading
from collections import Counter, deque
from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING

import torch

from proper.adapters.records import Head
from proper.adapters.residents import Counts
from proper.adapters.store import AdapterStore
from proper.errors import InputError, ProperError
from proper.inference.batch import Batch
from proper.inference.guests import Guest, Limits, Stats, Ticket
from proper.inference.loading import Loading
from proper.inference.prefixes import Origin, Prefixes
from proper.inference.requests import Event, Finished, Reason, Request, Sink, Started, Token
from proper.inference.sampling import Sampler
from proper.inference.waiting import Waiting

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

    def __init__(self, model: PersonalizedModel, limits: Limits | None = None, *, strict: bool = False) -> None:
        limits = limits or Limits()
        self.model, self.limits, self.limit = model, limits, limits.length or model.config.compute.max_length
        self._strict = strict
        self.changed = threading.Condition()
        self._loading = Loading(model, limits.bank, self.wake, strict)
        self._prefixes = Prefixes(limits.prefix_bytes)
        self._inbox: deque[Ticket] = deque()
        self._forget: deque[tuple[str, str]] = deque()
        self._recheck = False
        self._waiting: Waiting[Guest] = Waiting(limits.patience)
        self._batch = Batch(model, limits.rows, self.limit, self._prefixes)
        self._open, self._closed = 0, False
        self._counts: Counter[str] = Counter()
        self._tokens: Counter[str] = Counter()

    def submit(self, request: Request, sink: Sink) -> Ticket:
        """Accept a request; the sink is told about it from the thread that runs the steps.

        Raises:
            InputError: the prompt is empty, or does not fit with its answer.
            ProperError: the engine is closed.
        """
        size = len(request.prompt) + request.sampling.max_new_tokens
        if not request.prompt or request.sampling.max_new_tokens < 1:
            raise InputError("a prompt and its answer have at least one token each")
        if size > self.limit:
            raise InputError(f"prompt and answer may have {self.limit} tokens together, these would have {size}")
        ticket = Ticket(request, sink, self.wake)
        with self.changed:
            if self._closed:
                raise ProperError("the engine is closed")
            self._open += 1
            self._inbox.append(ticket)
            self.changed.notify_all()
        return ticket

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

    def stats(self) -> Stats:
        """Return a snapshot; for any thread."""
        residents, counts = self._loading.residents, self._counts
        return Stats(
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
            adapters=replace(residents.counts) if residents is not None else Counts(),
        )

    def close(self) -> None:
        """End every request as cancelled, and the loading thread; the bank is the model's own again."""
        with self.changed:
            self._closed = True
        self._take_in()
        for guest in self._waiting.remove(lambda _: True):
            self._say(guest, Finished("cancelled"))
        self._end_all("cancelled")
        self._loading.close()

    @torch.no_grad()
    def step(self) -> None:
        """Give every row one more token, after letting go and taking in.

        Raises:
            StoreError: an adapter is damaged, if `strict`; and then also whatever the model raises.
        """
        self._take_in()
        self._let_go()
        # Loads go on while the rows compute: who needs one does not wait a step longer than who does not.
        self._loading.ahead(self._waiting.items())
        self._guarded(self._decode)
        if self._strict:
            self.settle()
        self._loading.collect(self._waiting.items())
        self._guarded(self._prefill)
        self._counts["steps"] += 1

    def _decode(self) -> None:
        if len(self._batch):
            self._hand_out(self._batch.decode(), 0)

    def _prefill(self) -> None:
        seated = self._seat()
        if seated:
            self._counts["prompt"] += sum(guest.size for guest in seated)
            self._hand_out(self._batch.prefill(len(seated)), len(self._batch) - len(seated))

    def _guarded(self, work: Callable[[], None]) -> None:
        try:
            work()
        except Exception as error:
            # Out of memory, a device that fails, a token beyond the vocabulary: whoever asked hears of it, and the
            # next ones may do better.
            self._counts["errors"] += self._end_all("error", f"{type(error).__name__}: {error}")
            if self._strict:
                raise

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
            guest = Guest(ticket, Sampler(ticket.request.sampling))
            self._loading.accept(guest)
            self._waiting.add(guest)

    def _let_go(self) -> None:
        for guest in self._waiting.remove(lambda guest: guest.ticket.cancelled):
            self._say(guest, Finished("cancelled"))
        for row in reversed(range(len(self._batch))):
            if self._batch.guests[row].ticket.cancelled:
                self._leave(row, "cancelled")

    def _seat(self) -> list[Guest]:
        free = self.limits.rows - len(self._batch)
        seated = self._waiting.take(free, self.limits.prefill, self._loading.ready)
        for guest in seated:
            self._loading.take(guest)
            guest.origin = self._origin(guest, guest.head)
            self._batch.guests.append(guest)
            version = None if guest.head is None else guest.head.version
            self._say(guest, Started(self._tier(guest), version, guest.fallback))
        return seated

    def _origin(self, guest: Guest, head: Head | None) -> Origin | None:
        """Return whose keys and values a row's are under this record; None for those that are not kept."""
        if head is None or guest.owner is None or not self._prefixes.budget:
            return None
        return Origin.of(*guest.owner, head, adapter=guest.slot >= 0)

    def _hand_out(self, tokens: list[Token], first: int) -> None:
        """Give rows from `first` on their next token; those that are done leave."""
        guests = self._batch.guests[first : first + len(tokens)]
        for row in reversed(range(len(guests))):
            guest, token = guests[row], tokens[row]
            if token.id == self.model.encoder.end:
                self._leave(first + row, "stop")
                continue
            guest.said.append(token.id)
            self._tokens[self._tier(guest)] += 1
            self._say(guest, token)
            if len(guest.said) == guest.request.sampling.max_new_tokens:
                self._leave(first + row, "length")

    def _leave(self, row: int, reason: Reason) -> None:
        guest = self._batch.guests[row]
        if guest.origin is not None and guest.origin != self._origin(guest, self._loading.head(guest)):
            guest.origin = None  # they were updated or deleted meanwhile, and leave nothing
        self._batch.leave(row)
        self._loading.release(guest)
        self._say(guest, Finished(reason))

    def _end_all(self, reason: Reason, error: str | None = None) -> int:
        """End all rows, whatever they hold; return how many there were."""
        guests = self._batch.clear()
        for guest in guests:
            self._loading.release(guest)
            self._say(guest, Finished(reason, error))
        return len(guests)

    def _tier(self, guest: Guest) -> str:
        if self.model.cache is None or self.model.stage in ("base", "population"):
            return self.model.stage
        if not guest.grouped:
            return "population"
        if guest.head is None:
            return "none"
        return "users" if guest.slot >= 0 else "groups"

    def _say(self, guest: Guest, event: Event) -> None:
        if isinstance(event, Finished):
            with self.changed:
                self._open -= 1
        try:
            guest.ticket.sink(event)
        except Exception:
            # Whoever asked is gone; the others' rows go on. It is counted, and the row is free before the next step.
            self._counts["deaf"] += 1
            guest.ticket.cancelled = True
