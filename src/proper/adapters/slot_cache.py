"""LRU cache of LoRA adapters in the slots of a bank, with pinning and asynchronous loads.

A slot holds one version of one user's adapter, so a user who is updated occupies two slots while requests on the old
version run. A pinned slot is never evicted; of the others the least recently used is. Adapters are loaded on a second
thread: `load` starts a load, `collect` applies the finished ones, and `fetch` does both and waits.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Collection, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from typing import NamedTuple

from proper.adapters.load import RowLoader
from proper.adapters.records import Head
from proper.adapters.store import AdapterStore
from proper.errors import StoreError
from proper.layers.bank import AdapterBank
from proper.run_folder import Tier


class AdapterKey(NamedTuple):
    """One version of one user's adapter. The checksum distinguishes versions of a user deleted and enrolled again."""

    tenant: str
    user: str
    version: int
    checksum: bytes

    @classmethod
    def of(cls, tenant: str, user: str, head: Head | None) -> AdapterKey | None:
        """Return the key of a record, or None for one without an adapter."""
        if head is None or head.tier != Tier.USERS or head.checksum is None:
            return None
        return cls(tenant, user, head.version, head.checksum)


@dataclass(frozen=True)
class LoadResult:
    """The result of one load.

    Attributes:
        requested: the key that `load` was called with.
        head: the record found; a newer one if the user was updated meanwhile, None if the user was deleted.
        error: why the adapter could not be loaded; None if it was, or if the record has no adapter.
    """

    requested: AdapterKey
    head: Head | None
    error: str | None = None

    @property
    def key(self) -> AdapterKey | None:
        """Key of the adapter that is in a slot now; None if there is none."""
        return AdapterKey.of(self.requested.tenant, self.requested.user, self.head)


@dataclass
class CacheCounts:
    """Counters: requests whose adapter was in a slot (`hits`), loads, evictions, and failed loads (`damaged`)."""

    hits: int = 0
    loads: int = 0
    evictions: int = 0
    damaged: int = 0


@dataclass
class _Slot:
    number: int
    pins: int = 0
    forgotten: bool = False


class SlotCache:
    """The slots of a bank, filled from the tenants' stores. Call all methods from one thread.

    Args:
        stores: returns the store of a tenant; called from the loading thread.
        bank: the bank whose slots are filled.

    Attributes:
        counts: counters since the cache was made or cleared.
        on_loaded: called from the loading thread when a load has finished.
    """

    def __init__(self, stores: Callable[[str], AdapterStore], bank: AdapterBank) -> None:
        self.bank, self.counts = bank, CacheCounts()
        self.on_loaded: Callable[[], None] = lambda: None
        self._stores = stores
        self._loaders: dict[str, RowLoader] = {}
        self._slots: OrderedDict[AdapterKey, _Slot] = OrderedDict()
        self._loading: dict[AdapterKey, tuple[int, Future[Head | None]]] = {}
        self._discarded: set[AdapterKey] = set()
        self._free = list(reversed(range(bank.slots)))
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="proper-load")

    def __len__(self) -> int:
        return len(self._slots)

    def __contains__(self, key: AdapterKey) -> bool:
        return key in self._slots

    @property
    def loading(self) -> int:
        """Number of loads that `collect` has not applied yet."""
        return len(self._loading)

    @property
    def pinned(self) -> int:
        """Number of pinned slots, which cannot be evicted."""
        return sum(slot.pins > 0 for slot in list(self._slots.values()))

    @property
    def finished(self) -> bool:
        """Whether at least one load has finished and can be collected."""
        return any(future.done() for _, future in self._loading.values())

    @property
    def settled(self) -> bool:
        """Whether no load is running; finished loads may still have to be collected."""
        return all(future.done() for _, future in self._loading.values())

    def fetch(self, keys: Sequence[AdapterKey | None]) -> list[int]:
        """Load adapters, wait for them, and return the slot of each key; -1 for None.

        The slots stay valid until the next call that loads something. A user who is updated meanwhile gets the slot of
        the newer version.

        Raises:
            StoreError: there are more different adapters than slots, or an adapter is damaged or gone.
        """
        wanted = dict.fromkeys(key for key in keys if key is not None)
        if len(wanted) > self.bank.slots:
            raise StoreError(f"{len(wanted)} users in one batch, and the bank has {self.bank.slots} slots")
        for key in wanted:
            if key in self._slots:
                self._slots.move_to_end(key)
        room = [self.load(key, wanted) for key in wanted]
        wait([future for _, future in self._loading.values()])
        found = {result.requested: result for result in self.collect()}
        if not all(room):
            raise StoreError(f"{len(wanted)} users in one batch, and too many of the bank's slots are pinned")
        slots = {key: self._slots[_loaded(found[key]) if key in found else key].number for key in wanted}
        return [-1 if key is None else slots[key] for key in keys]

    def load(self, key: AdapterKey, keep: Collection[AdapterKey]) -> bool:
        """Start loading an adapter unless it is cached or loading; return False if no slot can be freed for it.

        Args:
            key: the adapter to load.
            keep: adapters that must not be evicted although they are not pinned.
        """
        if key in self._slots or key in self._loading:
            return True
        number = self._free_slot(keep)
        if number is None:
            return False
        future = self._thread.submit(self._read, key, number)
        self._loading[key] = (number, future)
        future.add_done_callback(lambda _: self.on_loaded())
        return True

    def collect(self) -> list[LoadResult]:
        """Apply the loads that have finished since the last call, and return their results."""
        done = [key for key, (_, future) in self._loading.items() if future.done()]
        return [self._apply(key) for key in done]

    def pin(self, key: AdapterKey) -> int:
        """Return the slot of a cached adapter, and protect it from eviction until `unpin`."""
        slot = self._slots[key]
        slot.pins += 1
        self._slots.move_to_end(key)
        return slot.number

    def unpin(self, key: AdapterKey) -> None:
        """Undo one `pin`."""
        slot = self._slots[key]
        slot.pins -= 1
        if slot.forgotten and not slot.pins:
            self._wipe(key)

    def forget(self, tenant: str, user: str) -> None:
        """Zero every slot of a user, pinned ones once they are unpinned, and discard the user's running loads."""
        self._discarded |= {key for key in self._loading if (key.tenant, key.user) == (tenant, user)}
        for key in [key for key in self._slots if (key.tenant, key.user) == (tenant, user)]:
            self._slots[key].forgotten = True
            if not self._slots[key].pins:
                self._wipe(key)

    def owners(self) -> set[tuple[str, str]]:
        """Return tenant and user of every adapter that is cached or loading."""
        return {(key.tenant, key.user) for key in (*self._slots, *self._loading)}

    def clear(self) -> None:
        """Wait for the running load, cancel the others, mark every slot as empty and reset the counters."""
        futures = [future for _, future in self._loading.values()]
        wait([future for future in futures if not future.cancel()])
        self._loading.clear()
        self._discarded.clear()
        self._slots.clear()
        self._free = list(reversed(range(self.bank.slots)))
        self.counts = CacheCounts()

    def close(self) -> None:
        """Clear the cache and end the loading thread."""
        self.clear()
        self._thread.shutdown()

    def _free_slot(self, keep: Collection[AdapterKey]) -> int | None:
        if self._free:
            return self._free.pop()
        for key, slot in self._slots.items():
            if not slot.pins and key not in keep:
                del self._slots[key]
                self.counts.evictions += 1
                return slot.number
        return None

    def _read(self, key: AdapterKey, number: int) -> Head | None:
        """Load an adapter into a slot; runs on the loading thread."""
        loader = self._loaders.get(key.tenant)
        if loader is None:
            loader = self._loaders[key.tenant] = RowLoader(self._stores(key.tenant), self.bank.layout)
        return loader.load(key.user, self.bank.values[number])

    def _apply(self, requested: AdapterKey) -> LoadResult:
        number, future = self._loading.pop(requested)
        if requested in self._discarded:
            self._discarded.remove(requested)
            self.bank.values[number].zero_()
            self._free.append(number)
            return LoadResult(requested, None)
        error = future.exception()
        if error is not None:
            self._free.append(number)
            self.counts.damaged += 1
            # Any error concerns this user only: adapters of other users load as before.
            known = isinstance(error, StoreError | OSError)
            return LoadResult(requested, None, str(error) if known else f"{type(error).__name__}: {error}")
        result = LoadResult(requested, future.result())
        if result.key is None or result.key in self._slots:
            self._free.append(number)
        else:
            self._slots[result.key] = _Slot(number)
            self.counts.loads += 1
        return result

    def _wipe(self, key: AdapterKey) -> None:
        slot = self._slots.pop(key)
        self.bank.values[slot.number].zero_()
        self._free.append(slot.number)


def _loaded(result: LoadResult) -> AdapterKey:
    """Return the key of the adapter that a load has put into a slot.

    Raises:
        StoreError: the load failed, or found no adapter.
    """
    if result.error is not None:
        raise StoreError(result.error)
    if result.key is None:
        raise StoreError(f"user {result.requested.user!r} lost their adapter while it was being loaded")
    return result.key
