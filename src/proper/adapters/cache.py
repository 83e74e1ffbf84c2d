"""Slots in front of the store: the users of a batch are in the bank when the batch runs.

The least recently used slot makes room. Knows nothing about batches or models.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence

import torch
from jaxtyping import Float, Int
from torch import Tensor

from proper.adapters.store import AdapterStore, Tier
from proper.errors import StoreError
from proper.layers.bank import AdapterBank


class SlotCache:
    """A bank of S slots kept filled from a store.

    Attributes:
        bank: where adapters lie while they are used; None if the store has none that this model could use.
        mean: the mean user embedding (D,), for users the store does not know.
    """

    def __init__(self, store: AdapterStore, bank: AdapterBank | None, mean: Float[Tensor, "D"]) -> None:
        self.store, self.bank, self.mean = store, bank, mean
        self._slots: OrderedDict[str, int] = OrderedDict()
        self._known: dict[str, tuple[Float[Tensor, "D"], Tier]] = {}

    def tier(self, user: str | None) -> str:
        """Return "users", "groups", or "none" for a user the store does not know."""
        return self._look_up(user)[1] if user is not None and self._has(user) else "none"

    def embeddings(self, users: Sequence[str | None]) -> Float[Tensor, "B D"]:
        """Return every row's user embedding; the mean for unknown users."""
        return torch.stack([self._look_up(u)[0] if u is not None and self._has(u) else self.mean for u in users])

    def slots(self, users: Sequence[str | None]) -> Int[Tensor, "B"] | None:
        """Load the adapters of these users and return each row's slot, -1 for rows without one.

        Raises:
            StoreError: the batch has more different users than the bank has slots, or an adapter is damaged.
        """
        wanted = [user if user is not None and self.tier(user) == "users" else None for user in users]
        distinct = list(dict.fromkeys(user for user in wanted if user is not None))
        if self.bank is None or not distinct:
            return None
        if len(distinct) > self.bank.slots:
            raise StoreError(f"{len(distinct)} users in one batch, and the bank has {self.bank.slots} slots")
        for user in distinct:
            if user in self._slots:
                self._slots.move_to_end(user)
        for user in distinct:
            if user not in self._slots:
                self._load(user, self._free(keep=distinct))
        return torch.tensor([self._slots[user] if user is not None else -1 for user in wanted])

    def _load(self, user: str, slot: int) -> None:
        assert self.bank is not None
        record = self.store.get(user)
        if record is None or record.adapter is None:
            raise StoreError(f"user {user!r} lost their adapter while it was being loaded")
        try:
            self.bank.layout.pack(record.adapter, self.bank.values[slot])
        except ValueError as error:
            raise StoreError(f"the adapter of user {user!r} does not fit: {error}") from error
        self._slots[user] = slot

    def _free(self, keep: Sequence[str]) -> int:
        assert self.bank is not None
        if len(self._slots) < self.bank.slots:
            return next(slot for slot in range(self.bank.slots) if slot not in set(self._slots.values()))
        oldest = next(user for user in self._slots if user not in keep)
        return self._slots.pop(oldest)

    def _has(self, user: str) -> bool:
        if user in self._known:
            return True
        record = self.store.get(user)
        if record is not None:
            self._known[user] = (record.embedding, record.tier)
        return record is not None

    def _look_up(self, user: str) -> tuple[Float[Tensor, "D"], Tier]:
        return self._known[user]
