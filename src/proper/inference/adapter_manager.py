"""Adapter manager of the engine: loads the LoRA adapters that requests need from the stores into bank slots.

A request is tied to the version of its user's record that is current when the request is accepted; if its adapter has
to be loaded, the request takes the version that the load found.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable

from proper.adapters.async_slot_cache import AdapterKey, AsyncSlotCache, LoadResult
from proper.adapters.records import Head
from proper.adapters.store import AdapterStore
from proper.adapters.validation import fault_of
from proper.errors import ProperError, StoreError
from proper.inference.model import PersonalizedModel
from proper.inference.requests import RunningRequest
from proper.layers.bank import AdapterBank
from proper.run_folder import Tier

DAMAGED = "damaged adapter"
DAMAGED_EMBEDDING = "damaged embedding"


class AdapterManager:
    """An engine's tenant stores and slot cache. Only `store` is thread-safe; the rest is for the engine's thread.

    Args:
        model: the model whose bank is filled; until `close` nothing else may write to that bank.
        slots: number of adapters in the bank; a bank of another size is replaced.
        wake: called from the loading thread when a load has ended.
        strict: raise for a damaged adapter instead of answering without it.

    Attributes:
        residents: the slot cache; None where no user has an adapter.
        fallbacks: number of requests answered without their damaged adapter or embedding so far.
    """

    def __init__(self, model: PersonalizedModel, slots: int, wake: Callable[[], None], strict: bool) -> None:
        self.fallbacks = 0
        self._model, self._strict, self._lock = model, strict, threading.Lock()
        self._stores = {"": model.store} if model.store is not None else {}
        self.residents = self._make_residents(slots, wake)

    def store(self, tenant: str) -> AdapterStore:
        """Return a tenant's store, which the first call opens; thread-safe.

        Raises:
            ProperError: the run has no users.
        """
        with self._lock:
            if tenant not in self._stores:
                if self._model.store is None:
                    raise ProperError("this run has no users: its stage 2 is missing")
                self._stores[tenant] = AdapterStore(self._model.store.folder, tenant)
            return self._stores[tenant]

    @property
    def underway(self) -> int:
        """Number of loads whose result has not been collected."""
        return self.residents.loading if self.residents is not None else 0

    @property
    def finished(self) -> bool:
        """Whether a load has ended and its result can be collected."""
        return self.residents is not None and self.residents.finished

    @property
    def settled(self) -> bool:
        """Whether no load is running."""
        return self.residents is None or self.residents.settled

    def head(self, guest: RunningRequest) -> Head | None:
        """Return the current record of the request's user; None if the request has no user or the store has none."""
        if guest.owner is None or self._model.served is None:
            return None
        return self.store(guest.owner[0]).head(guest.owner[1])

    def accept(self, guest: RunningRequest) -> None:
        """Tie a request to its user's record; a user whose embedding is damaged is answered like an unknown user.

        Raises:
            StoreError: the record cannot be read, or, if `strict`, its embedding is damaged.
        """
        guest.head = self.head(guest)
        if guest.head is not None and (fault := self._fault(guest.head)) is not None:
            if self._strict:
                raise StoreError(f"user {guest.request.user!r}: {fault}")
            guest.head, guest.fallback = None, DAMAGED_EMBEDDING
            self.fallbacks += 1
        if guest.owner is None or self.residents is None or guest.request.tier != Tier.USERS:
            return
        guest.key = AdapterKey.of(*guest.owner, guest.head)
        if guest.key is not None and guest.key in self.residents:
            self.residents.counts.hits += 1

    def collect(self, waiting: Iterable[RunningRequest]) -> None:
        """Collect the loads that have ended, and update the waiting requests that need those adapters.

        Raises:
            StoreError: an adapter is damaged, if `strict`.
        """
        guests = list(waiting)
        for outcome in self.residents.collect() if self.residents is not None else []:
            for guest in guests:
                if guest.key == outcome.asked:
                    self._settle(guest, outcome)

    def ready(self, guest: RunningRequest) -> bool:
        """Whether a request needs no adapter or its adapter is in a slot."""
        return guest.key is None or (self.residents is not None and guest.key in self.residents)

    def ahead(self, waiting: Iterable[RunningRequest]) -> None:
        """Prefetch adapters of waiting requests in queue order; no load evicts the adapter of an earlier request."""
        if self.residents is None:
            return
        keep: set[AdapterKey] = set()
        for guest in waiting:
            if guest.key is None:
                continue
            if len(keep) == self.residents.bank.slots or not self.residents.load(guest.key, keep):
                break
            keep.add(guest.key)

    def take(self, guest: RunningRequest) -> None:
        """Pin a request's adapter, which must be loaded, to its slot until `release`."""
        if self.residents is not None and guest.key is not None:
            guest.slot = self.residents.pin(guest.key)

    def release(self, guest: RunningRequest) -> None:
        """Unpin a request's adapter, if `take` pinned it."""
        if self.residents is not None and guest.key is not None and guest.slot >= 0:
            self.residents.unpin(guest.key)

    def forget(self, tenant: str, user: str) -> None:
        """Wipe a user's adapters from the bank once no running request uses them."""
        if self.residents is not None:
            self.residents.forget(tenant, user)

    def owners(self) -> set[tuple[str, str]]:
        """Return (tenant, user) of every adapter that is in a slot or being loaded."""
        return self.residents.owners() if self.residents is not None else set()

    def is_gone(self, tenant: str, user: str) -> bool:
        """Whether a user is no longer in the tenant's store."""
        return self.store(tenant).head(user) is None

    def close(self) -> None:
        """End the loading thread, close the stores and give the model its own bank back."""
        if self.residents is not None:
            self.residents.close()
            assert self._model.served is not None
            self._model.served.cache.clear()
            self._model.model.use_bank(self._model.served.bank)
        for tenant, store in self._stores.items():
            if tenant:  # the default tenant's store belongs to the model
                store.close()

    def _make_residents(self, slots: int, wake: Callable[[], None]) -> AsyncSlotCache | None:
        served = self._model.served
        if served is None or self._model.stage != Tier.USERS:
            return None
        bank = served.bank
        if bank.slots != slots:
            alpha, form = bank.scale * bank.layout.rank, bank.values
            bank = AdapterBank(bank.layout, slots, alpha=alpha, trainable=False, device=form.device, dtype=form.dtype)
            self._model.model.use_bank(bank)
        return AsyncSlotCache(self.store, bank, wake)

    def _fault(self, head: Head) -> str | None:
        assert self._model.served is not None
        held, wanted = tuple(head.embedding.shape), tuple(self._model.served.mean.shape)
        if held != wanted:
            return f"embedding: has shape {held}, this run's have {wanted}"
        return fault_of({"embedding": head.embedding})

    def _settle(self, guest: RunningRequest, outcome: LoadResult) -> None:
        """Apply the result of a load to a request that needs the adapter."""
        if outcome.error is not None:
            if self._strict:
                raise StoreError(outcome.error)
            guest.key, guest.fallback = None, DAMAGED
            self.fallbacks += 1
        else:
            assert guest.owner is not None
            guest.head, guest.key = outcome.head, AdapterKey.of(*guest.owner, outcome.head)
