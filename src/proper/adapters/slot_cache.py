"""Synchronous LRU cache of LoRA adapters in bank slots: loads the adapters of a batch before the batch runs.

The least recently used slot is evicted.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence

import torch
from jaxtyping import Float, Int
from torch import Tensor

from proper.adapters.load import RowLoader
from proper.adapters.store import AdapterStore, Head
from proper.adapters.validation import require_sound
from proper.errors import StoreError
from proper.layers.bank import AdapterBank
from proper.run_folder import Tier


class SlotCache:
    """A bank of S slots kept filled from a store.

    Attributes:
        bank: the bank with the slots; None if the store has no adapters that this model can use.
        mean: the mean user embedding (D,), for users the store does not know.
    """

    def __init__(self, store: AdapterStore, bank: AdapterBank | None, mean: Float[Tensor, "D"]) -> None:
        self.store, self.bank, self.mean = store, bank, mean
        self._loader = RowLoader(store, bank.layout) if bank is not None else None
        self._slots: OrderedDict[str, int] = OrderedDict()
        self._checksums: dict[str, bytes | None] = {}

    def tier(self, user: str | None) -> Tier:
        """Return USERS, GROUPS, or NONE for a user the store does not know."""
        head = self._head(user)
        return head.tier if head is not None else Tier.NONE

    def embeddings(self, users: Sequence[str | None]) -> Float[Tensor, "B D"]:
        """Return every row's user embedding; the mean for unknown users.

        Raises:
            StoreError: an embedding has numbers that are not finite or absurdly large.
        """
        heads = [self._head(user) for user in users]
        for user, head in zip(users, heads, strict=True):
            if user is not None and head is not None:
                require_sound(user, {"embedding": head.embedding})
        return torch.stack([head.embedding if head is not None else self.mean for head in heads])

    def slots(self, users: Sequence[str | None]) -> Int[Tensor, "B"] | None:
        """Load the adapters of these users and return each row's slot, -1 for rows without one.

        Raises:
            StoreError: the batch has more different users than the bank has slots, or an adapter is damaged.
        """
        heads = {user: head for user in dict.fromkeys(users) if (head := self._head(user)) and head.tier == "users"}
        distinct = [user for user in heads if user is not None]
        if self.bank is None or not distinct:
            return None
        if len(distinct) > self.bank.slots:
            raise StoreError(f"{len(distinct)} users in one batch, and the bank has {self.bank.slots} slots")
        for user in distinct:
            # A slot whose checksum differs from the head's is out of date. Version numbers would not tell: they start
            # again when a user is deleted and enrolled anew.
            if user in self._slots and self._checksums[user] == heads[user].checksum:
                self._slots.move_to_end(user)
        for user in distinct:
            if user not in self._slots or self._checksums[user] != heads[user].checksum:
                self._load(user, self._slots.pop(user, None), keep=distinct)
        wanted = [user if user in heads else None for user in users]
        return torch.tensor([self._slots[user] if user is not None else -1 for user in wanted])

    def clear(self) -> None:
        """Mark all slots as empty, because other code has overwritten the bank."""
        self._slots.clear()
        self._checksums.clear()

    def _load(self, user: str, slot: int | None, keep: Sequence[str]) -> None:
        assert self.bank is not None and self._loader is not None
        slot = self._free(keep) if slot is None else slot
        self._checksums[user] = self._loader.load(user, self.bank.values[slot])
        self._slots[user] = slot

    def _free(self, keep: Sequence[str]) -> int:
        assert self.bank is not None
        if len(self._slots) < self.bank.slots:
            return next(slot for slot in range(self.bank.slots) if slot not in set(self._slots.values()))
        oldest = next(user for user in self._slots if user not in keep)
        return self._slots.pop(oldest)

    def _head(self, user: str | None) -> Head | None:
        return None if user is None else self.store.head(user)
