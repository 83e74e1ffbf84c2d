"""Adapter manager of the engine: loads the LoRA adapters that requests need from the stores into bank slots.

A request is tied to the version of its user's record that is current when the request is accepted; if its adapter has
to be loaded, the request takes the version that the load found.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

from proper.adapters.records import Head
from proper.adapters.serialization import fault_of
from proper.adapters.slot_cache import AdapterKey, LoadResult, SlotCache
from proper.adapters.store import AdapterStore
from proper.errors import ProperError, StoreError
from proper.inference.model import PersonalizedModel
from proper.inference.requests import RequestHandle
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
        cache: the slot cache; None where no user has an adapter.
        fallbacks: number of requests answered without their damaged adapter or embedding so far.
    """

    def __init__(self, model: PersonalizedModel, slots: int, wake: Callable[[], None], strict: bool) -> None:
        self.fallbacks = 0
        self._model, self._strict = model, strict
        self.cache = self._open_cache(slots)
        if self.cache is not None:
            self.cache.on_loaded = wake

    def store(self, tenant: str) -> AdapterStore:
        """Return a tenant's store, which the first call opens; thread-safe.

        Raises:
            ProperError: the run has no users.
        """
        if self._model.served is None:
            raise ProperError("this run has no users: its stage 'groups' is not trained")
        return self._model.served.store_of(tenant)

    @property
    def loading(self) -> int:
        """Number of loads whose result has not been collected."""
        return self.cache.loading if self.cache is not None else 0

    @property
    def finished(self) -> bool:
        """Whether a load has ended and its result can be collected."""
        return self.cache is not None and self.cache.finished

    @property
    def settled(self) -> bool:
        """Whether no load is running."""
        return self.cache is None or self.cache.settled

    def head(self, handle: RequestHandle) -> Head | None:
        """Return the current record of the request's user; None if the request has no user or the store has none."""
        if handle.owner is None or self._model.served is None:
            return None
        return self.store(handle.owner[0]).head(handle.owner[1])

    def accept(self, handle: RequestHandle) -> None:
        """Tie a request to its user's record; a user whose embedding is damaged is answered like an unknown user.

        Raises:
            StoreError: the record cannot be read, or, if `strict`, its embedding is damaged.
        """
        handle.head = self.head(handle)
        if handle.head is not None and (fault := self._fault(handle.head)) is not None:
            if self._strict:
                raise StoreError(f"user {handle.request.user!r}: {fault}")
            handle.head, handle.fallback = None, DAMAGED_EMBEDDING
            self.fallbacks += 1
        if handle.owner is None or self.cache is None or handle.request.tier != Tier.USERS:
            return
        handle.key = AdapterKey.of(*handle.owner, handle.head)
        if handle.key is not None and handle.key in self.cache:
            self.cache.counts.hits += 1

    def collect(self, waiting: Iterable[RequestHandle]) -> None:
        """Collect the loads that have ended, and update the waiting requests that need those adapters.

        Raises:
            StoreError: an adapter is damaged, if `strict`.
        """
        handles = list(waiting)
        for result in self.cache.collect() if self.cache is not None else []:
            for handle in handles:
                if handle.key == result.requested:
                    self._settle(handle, result)

    def ready(self, handle: RequestHandle) -> bool:
        """Whether a request needs no adapter or its adapter is in a slot."""
        return handle.key is None or (self.cache is not None and handle.key in self.cache)

    def prefetch(self, waiting: Iterable[RequestHandle]) -> None:
        """Prefetch adapters of waiting requests in queue order; no load evicts the adapter of an earlier request."""
        if self.cache is None:
            return
        keep: set[AdapterKey] = set()
        for handle in waiting:
            if handle.key is None:
                continue
            if len(keep) == self.cache.bank.slots or not self.cache.load(handle.key, keep):
                break
            keep.add(handle.key)

    def pin(self, handle: RequestHandle) -> None:
        """Pin a request's adapter, which must be loaded, to its slot until `release`."""
        if self.cache is not None and handle.key is not None:
            handle.slot = self.cache.pin(handle.key)

    def release(self, handle: RequestHandle) -> None:
        """Unpin a request's adapter, if `pin` pinned it."""
        if self.cache is not None and handle.key is not None and handle.slot >= 0:
            self.cache.unpin(handle.key)

    def tier(self, handle: RequestHandle) -> Tier:
        """Return the tier that answers a request."""
        if self._model.served is None or self._model.stage in (Tier.BASE, Tier.POPULATION):
            return self._model.stage
        if not handle.uses_experts:
            return Tier.POPULATION
        if handle.head is None:
            return Tier.NONE
        return Tier.USERS if handle.slot >= 0 else Tier.GROUPS

    def forget(self, tenant: str, user: str) -> None:
        """Wipe a user's adapters from the bank once no running request uses them."""
        if self.cache is not None:
            self.cache.forget(tenant, user)

    def owners(self) -> set[tuple[str, str]]:
        """Return (tenant, user) of every adapter that is in a slot or being loaded."""
        return self.cache.owners() if self.cache is not None else set()

    def is_gone(self, tenant: str, user: str) -> bool:
        """Whether a user is no longer in the tenant's store."""
        return self.store(tenant).head(user) is None

    def close(self) -> None:
        """Empty the slots and give the model its own bank back."""
        served = self._model.served
        if self.cache is None or served is None:
            return
        self.cache.on_loaded = lambda: None
        self.cache.clear()
        if self.cache is not served.cache:
            self.cache.close()
            self._model.model.use_bank(served.bank)

    def _open_cache(self, slots: int) -> SlotCache | None:
        """Return the model's own slot cache, emptied, or a new one if that has another number of slots.

        Emptied, because adapters that earlier calls have left would change which requests run together.
        """
        served = self._model.served
        if served is None or self._model.stage != Tier.USERS:
            return None
        served.cache.clear()
        bank = served.bank
        if bank.slots == slots:
            return served.cache
        alpha, form = bank.scale * bank.layout.rank, bank.values
        other = AdapterBank(bank.layout, slots, alpha=alpha, trainable=False, device=form.device, dtype=form.dtype)
        self._model.model.use_bank(other)
        return SlotCache(served.store_of, other)

    def _fault(self, head: Head) -> str | None:
        assert self._model.served is not None
        found, wanted = tuple(head.embedding.shape), tuple(self._model.served.mean.shape)
        if found != wanted:
            return f"embedding: has shape {found}, this run's have {wanted}"
        return fault_of({"embedding": head.embedding})

    def _settle(self, handle: RequestHandle, result: LoadResult) -> None:
        """Apply the result of a load to a request that needs the adapter."""
        if result.error is not None:
            if self._strict:
                raise StoreError(result.error)
            handle.key, handle.fallback = None, DAMAGED
            self.fallbacks += 1
        else:
            handle.head, handle.key = result.head, result.key
