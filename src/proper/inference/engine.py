"""Continuous batching for mixed users: a loop whose every step adds one token to every row, whoever it belongs to.

    step:  take in what came, let rows go -> seat those who wait and whose adapters are there -> one token per row

New rows are prefilled together and join the running ones. Keys and values are personal: a row shares them with nobody,
not even for the same prompt. A request keeps the version of its user's adapter from when it was accepted to its end.
Knows nothing about text, HTTP or time.
"""

from __future__ import annotations

import threading
from collections import Counter, deque
from dataclasses import replace

import torch

from proper.adapters.records import Head
from proper.adapters.residents import Counts, Key, Outcome, Residents
from proper.adapters.store import AdapterStore
from proper.errors import InputError, ProperError
from proper.inference.batch import Batch
from proper.inference.guests import Guest, Limits, Stats, Ticket
from proper.inference.personalized import PersonalizedModel
from proper.inference.requests import Event, Finished, Reason, Request, Sink, Started, Token
from proper.inference.sampling import Sampler
from proper.inference.waiting import Waiting
from proper.layers.bank import AdapterBank

DAMAGED = "damaged adapter"


class Engine:
    """One model, many requests. `submit` is for any thread, everything else for the one that runs the steps.

    While an engine lives, the model's own `generate` and `score` may not be used: both fill the same bank.

    Attributes:
        limit: tokens that a prompt and its answer may have together.
    """

    def __init__(self, model: PersonalizedModel, limits: Limits | None = None) -> None:
        limits = limits or Limits()
        self.model, self.limits, self.limit = model, limits, model.config.compute.max_length
        self.changed = threading.Condition()
        self._stores = {"": model.store} if model.store is not None else {}
        self._residents = self._make_residents()
        self._inbox: deque[Ticket] = deque()
        self._forget: deque[tuple[str, str]] = deque()
        self._waiting: Waiting[Guest] = Waiting(limits.patience)
        self._batch = Batch(model, limits.rows, self.limit)
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
        """Wipe a user's adapters from the bank once nothing runs on them; for any thread."""
        with self.changed:
            self._forget.append((tenant, user))
            self.changed.notify_all()

    def store(self, tenant: str) -> AdapterStore:
        """Return a tenant's store, opened when it is first asked for; for any thread.

        Raises:
            ProperError: the run has no users.
        """
        with self.changed:
            if tenant not in self._stores:
                if self.model.store is None:
                    raise ProperError("this run has no users: its stage 2 is missing")
                self._stores[tenant] = AdapterStore(self.model.store.folder, tenant)
            return self._stores[tenant]

    def wake(self) -> None:
        """Have whoever waits on `changed` look again; for any thread."""
        with self.changed:
            self.changed.notify_all()

    @property
    def idle(self) -> bool:
        """Whether no request is left without its end."""
        return not self._open

    @property
    def blocked(self) -> bool:
        """Whether the next step has nothing to do before a load ends or something is handed in or cancelled."""
        residents = self._residents
        if len(self._batch) or self._inbox or self._forget or (residents is not None and residents.finished):
            return False
        if len(self._waiting) and (residents is None or not residents.loading):
            return False  # a row that ended with its first token has freed what they wait for
        return not any(guest.ticket.cancelled or self._ready(guest) for guest in self._waiting.items())

    def stats(self) -> Stats:
        """Return a snapshot; for any thread."""
        residents, counts = self._residents, self._counts
        return Stats(
            waiting=len(self._waiting) + len(self._inbox),
            running=len(self._batch),
            slots=residents.bank.slots if residents is not None else 0,
            resident=len(residents) if residents is not None else 0,
            pinned=residents.pinned if residents is not None else 0,
            loading=residents.loading if residents is not None else 0,
            steps=counts["steps"],
            prompt_tokens=counts["prompt"],
            tokens=dict(self._tokens),
            fallbacks=counts["fallbacks"],
            errors=counts["errors"],
            adapters=replace(residents.counts) if residents is not None else Counts(),
        )

    def close(self) -> None:
        """End every request as cancelled, and the loading thread."""
        with self.changed:
            self._closed = True
        self._take_in()
        for guest in self._waiting.remove(lambda _: True):
            self._say(guest, Finished("cancelled"))
        while len(self._batch):
            self._leave(len(self._batch) - 1, "cancelled")
        if self._residents is not None:
            self._residents.close()
        for tenant, store in self._stores.items():
            if tenant:  # the others are the engine's own; this one is the model's
                store.close()

    @torch.no_grad()
    def step(self) -> None:
        """Give every row one more token, after letting go and taking in."""
        self._take_in()
        self._let_go()
        self._collect()
        try:
            if len(self._batch):
                self._hand_out(self._batch.decode(), 0)
            seated = self._seat()
            self._load_ahead()
            if seated:
                self._counts["prompt"] += sum(guest.size for guest in seated)
                self._hand_out(self._batch.prefill(len(seated)), len(self._batch) - len(seated))
        except Exception as error:
            # Out of memory, a device that fails, a token beyond the vocabulary: whoever asked hears of it, and the
            # next ones may do better.
            self._fail(f"{type(error).__name__}: {error}")
        self._counts["steps"] += 1

    def _make_residents(self) -> Residents | None:
        cache = self.model.cache
        if cache is None or cache.bank is None or self.model.stage != "users":
            return None
        bank = cache.bank
        if bank.slots != self.limits.bank:
            alpha, form = bank.scale * bank.layout.rank, bank.values
            bank = AdapterBank(
                bank.layout, self.limits.bank, alpha=alpha, trainable=False, device=form.device, dtype=form.dtype
            )
            self.model.model.use_bank(bank)
        return Residents(self.store, bank, self.wake)

    def _take_in(self) -> None:
        while self._forget:
            tenant, user = self._forget.popleft()
            if self._residents is not None:
                self._residents.forget(tenant, user)
        while self._inbox:
            ticket = self._inbox.popleft()
            guest = Guest(ticket, Sampler(ticket.request.sampling))
            if guest.owner is not None and self.model.cache is not None:
                self._accept(guest, self.store(guest.owner[0]).head(guest.owner[1]))
            self._waiting.add(guest)

    def _accept(self, guest: Guest, head: Head | None) -> None:
        """Tie a request to a record of its user."""
        assert guest.owner is not None
        guest.head = head
        wanted = self._residents is not None and guest.request.tier == "users"
        guest.key = Key.of(*guest.owner, head) if wanted else None
        if self._residents is not None and guest.key is not None and guest.key in self._residents:
            self._residents.counts.hits += 1

    def _let_go(self) -> None:
        for guest in self._waiting.remove(lambda guest: guest.ticket.cancelled):
            self._say(guest, Finished("cancelled"))
        for row in reversed(range(len(self._batch))):
            if self._batch.guests[row].ticket.cancelled:
                self._leave(row, "cancelled")

    def _collect(self) -> None:
        for outcome in self._residents.collect() if self._residents is not None else []:
            for guest in self._waiting.items():
                if guest.key == outcome.asked:
                    self._settle(guest, outcome)

    def _settle(self, guest: Guest, outcome: Outcome) -> None:
        """Tell a request that waits how the load of its adapter ended."""
        if outcome.error is not None:
            guest.key, guest.fallback = None, DAMAGED
            self._counts["fallbacks"] += 1
        else:
            assert guest.owner is not None
            guest.head, guest.key = outcome.head, Key.of(*guest.owner, outcome.head)

    def _seat(self) -> list[Guest]:
        seated = self._waiting.take(self.limits.rows - len(self._batch), self.limits.prefill, self._ready)
        for guest in seated:
            if self._residents is not None and guest.key is not None:
                guest.slot = self._residents.pin(guest.key)
            self._batch.guests.append(guest)
            version = None if guest.head is None else guest.head.version
            self._say(guest, Started(self._tier(guest), version, guest.fallback))
        return seated

    def _ready(self, guest: Guest) -> bool:
        return guest.key is None or (self._residents is not None and guest.key in self._residents)

    def _load_ahead(self) -> None:
        """Start loads for those who wait, the longest waiting first; nobody takes a slot from who waits longer."""
        if self._residents is None:
            return
        keep: set[Key] = set()
        for guest in self._waiting.items():
            if guest.key is None:
                continue
            if len(keep) == self._residents.bank.slots or not self._residents.load(guest.key, keep):
                break
            keep.add(guest.key)

    def _hand_out(self, tokens: list[Token], first: int) -> None:
        """Give rows from `first` on their next token; those that are done leave."""
        guests = self._batch.guests[first : first + len(tokens)]
        for row in reversed(range(len(guests))):
            guest, token = guests[row], tokens[row]
            if token.id == self.model.encoder.end:
                self._leave(first + row, "stop")
                continue
            guest.last, guest.made = token.id, guest.made + 1
            self._tokens[self._tier(guest)] += 1
            self._say(guest, token)
            if guest.made == guest.request.sampling.max_new_tokens:
                self._leave(first + row, "length")

    def _leave(self, row: int, reason: Reason, error: str | None = None) -> None:
        guest = self._batch.leave(row)
        if self._residents is not None and guest.key is not None and guest.slot >= 0:
            self._residents.unpin(guest.key)
        self._say(guest, Finished(reason, error))

    def _fail(self, error: str) -> None:
        """End all rows: what they hold may be half written."""
        guests = self._batch.clear()
        self._counts["errors"] += len(guests)
        for guest in guests:
            if self._residents is not None and guest.key is not None and guest.slot >= 0:
                self._residents.unpin(guest.key)
            self._say(guest, Finished("error", error))

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
