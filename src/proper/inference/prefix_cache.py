"""Prefix cache per user: keys and values of ended rows, reused when the user's next prompt begins with the same tokens.

From the second layer on, keys and values depend on the user's embedding and adapter. So each entry belongs to a
`PrefixKey` and is never shared between users, whatever tokens they send. This holds on the group tier too, where two
users' entries may be equal: the response time would reveal what another user has asked. Rows without a user, or of
users without a record, have no key and are not kept.
"""

from __future__ import annotations

import hashlib
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from proper.adapters.records import Head

MIN_TOKENS = 16
"""Minimum number of tokens of a prefix; shorter ones are not kept and are computed again."""

States = tuple[tuple[Float[Tensor, "H T D"], Float[Tensor, "H T D"]], ...]
"""Keys and values of each layer."""


class PrefixKey(NamedTuple):
    """Owner of cached keys and values, and the state they were computed with.

    Version numbers restart when a deleted user returns; the embedding's hash and the adapter's checksum tell such
    versions apart.
    """

    tenant: str
    user: str
    version: int
    checksum: bytes | None
    embedding: bytes
    adapter: bool
    task: int = 0

    @classmethod
    def of(cls, tenant: str, user: str, head: Head, *, adapter: bool, task: int = 0) -> PrefixKey:
        """Return the key of one user's rows.

        Args:
            tenant: the tenant.
            user: the user id within the tenant.
            head: the user's record that the row was computed with.
            adapter: whether the user's adapter is applied (users tier) or not (group tier).
            task: number of the row's task, which the routers of several tasks read.
        """
        numbers = head.embedding.detach().cpu().contiguous().view(torch.uint8).numpy()
        embedding = hashlib.blake2b(numbers.tobytes(), digest_size=16).digest()
        return cls(tenant, user, head.version, head.checksum, embedding, adapter, task)


_Entry = tuple[PrefixKey, tuple[int, ...]]


@dataclass(frozen=True)
class CachedPrefix:
    """The first tokens of a prompt, with their cached keys and values."""

    tokens: tuple[int, ...]
    states: States


class PrefixCache:
    """LRU cache of prefixes, up to `budget` bytes.

    Attributes:
        bytes: size of all cached keys and values.
    """

    def __init__(self, budget: int) -> None:
        self.budget, self.bytes = budget, 0
        self._kept: OrderedDict[_Entry, States] = OrderedDict()
        # Every request looks at one user's entries, of which there are few; of all users there may be very many.
        self._of_user: dict[tuple[str, str], dict[_Entry, None]] = {}

    def __len__(self) -> int:
        return len(self._kept)

    def key_of(
        self, owner: tuple[str, str] | None, head: Head | None, *, adapter: bool, task: int = 0
    ) -> PrefixKey | None:
        """Return the key of a row of this (tenant, user) and record; None if the row is not to be cached."""
        if head is None or owner is None or not self.budget:
            return None
        return PrefixKey.of(*owner, head, adapter=adapter, task=task)

    def find(self, key: PrefixKey | None, prompt: Sequence[int]) -> CachedPrefix | None:
        """Return the longest cached prefix of `prompt` as views of the cached tensors.

        A prefix shorter than half of the prompt is not worth a separate forward pass, so it gives None. So does a
        whole prompt: its last token alone is rounded otherwise than in the pass over all tokens, and in bf16 the same
        request could have another answer the second time. Entries of other versions of this user are dropped: the user
        has a new version.
        """
        if key is None:
            return None
        for entry in self._entries(key.tenant, key.user):
            if entry[0][:-2] != key[:-2]:
                self._pop(entry)
        own = self._entries(key.tenant, key.user)
        found = [(_shared(tokens, prompt), tokens) for owner, tokens in own if owner == key]
        shared, tokens = max(found, default=(0, ()))
        if shared == len(prompt) or shared < max(MIN_TOKENS, len(prompt) / 2):
            return None
        self._kept.move_to_end((key, tokens))
        states = self._kept[key, tokens]
        return CachedPrefix(tokens[:shared], tuple((keys[:, :shared], values[:, :shared]) for keys, values in states))

    def keep(self, key: PrefixKey | None, tokens: tuple[int, ...], states: States) -> None:
        """Store a copy of a row's tokens and of each layer's keys and values, if it fits the budget."""
        size = _size(states)
        if key is None or len(tokens) < MIN_TOKENS or size > self.budget:
            return
        for owner, other in self._entries(key.tenant, key.user):
            if owner != key:
                continue
            if other[: len(tokens)] == tokens:
                self._kept.move_to_end((owner, other))
                return
            if tokens[: len(other)] == other:
                self._pop((owner, other))
        while self.bytes + size > self.budget:
            self._pop(next(iter(self._kept)))
        self._kept[key, tokens] = tuple((keys.clone(), values.clone()) for keys, values in states)
        self._of_user.setdefault((key.tenant, key.user), {})[key, tokens] = None
        self.bytes += size

    def forget(self, tenant: str, user: str) -> None:
        """Drop all entries of a user."""
        for entry in self._entries(tenant, user):
            self._pop(entry)

    def owners(self) -> set[tuple[str, str]]:
        """Return (tenant, user) of all entries."""
        return set(self._of_user)

    def _entries(self, tenant: str, user: str) -> list[_Entry]:
        return list(self._of_user.get((tenant, user), ()))

    def _pop(self, entry: _Entry) -> None:
        self.bytes -= _size(self._kept.pop(entry))
        owner = (entry[0].tenant, entry[0].user)
        del self._of_user[owner][entry]
        if not self._of_user[owner]:
            del self._of_user[owner]


def _shared(one: Sequence[int], other: Sequence[int]) -> int:
    """Return the length of the common prefix of two token rows."""
    length = min(len(one), len(other))
    return next((at for at in range(length) if one[at] != other[at]), length)


def _size(states: States) -> int:
    return sum(tensor.nbytes for pair in states for tensor in pair)
