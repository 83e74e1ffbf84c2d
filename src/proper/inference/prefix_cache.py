"""Keys and values of rows that have ended, for the same person's next prompt if it begins with the same tokens.

Keys and values depend on all that computed them: from the second layer on, on the user's embedding and adapter. So they
belong to a `PrefixKey` and are never anybody else's, whatever tokens they send: not on the group tier either, where two
people's may even be equal, for how fast an answer comes would tell what somebody else has asked. Nobody's, and those of
people without a record, belong to no origin and are not kept. Knows nothing about models, rows or requests.
"""

from __future__ import annotations

import hashlib
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from proper.adapters.records import Head

SHORTEST = 16
"""Tokens; fewer are computed again."""

States = tuple[tuple[Float[Tensor, "H T D"], Float[Tensor, "H T D"]], ...]
"""Each layer's keys and values."""


class PrefixKey(NamedTuple):
    """Whose keys and values, and what they were computed with.

    The embedding's hash and the adapter's checksum tell apart versions of a user who was deleted and came back.
    """

    tenant: str
    user: str
    version: int
    checksum: bytes | None
    embedding: bytes
    adapter: bool

    @classmethod
    def of(cls, tenant: str, user: str, head: Head, *, adapter: bool) -> PrefixKey:
        """Return the origin of one person's rows.

        Args:
            tenant: whose user.
            user: who.
            head: the record in force.
            adapter: whether the user's own adapter takes part (the users tier) or not (the group tier).
        """
        numbers = head.embedding.detach().cpu().contiguous().view(torch.uint8).numpy()
        embedding = hashlib.blake2b(numbers.tobytes(), digest_size=16).digest()
        return cls(tenant, user, head.version, head.checksum, embedding, adapter)


@dataclass(frozen=True)
class CachedPrefix:
    """The first tokens of a prompt, already computed."""

    tokens: tuple[int, ...]
    states: States


class PrefixCache:
    """What is kept, up to `budget` bytes; the least recently used makes room.

    Attributes:
        bytes: of all that is kept.
    """

    def __init__(self, budget: int) -> None:
        self.budget, self.bytes = budget, 0
        self._kept: OrderedDict[tuple[PrefixKey, tuple[int, ...]], States] = OrderedDict()

    def __len__(self) -> int:
        return len(self._kept)

    def find(self, origin: PrefixKey | None, prompt: Sequence[int]) -> CachedPrefix | None:
        """Return the longest beginning of `prompt` that is there, views of what is kept; never all of the prompt.

        Half of the prompt must be there, or it is not worth a pass of its own. What is there of other versions of this
        person goes: they have a new one.
        """
        if origin is None:
            return None
        self._drop(lambda other: other[:2] == origin[:2] and other[:-1] != origin[:-1])
        found = [(_shared(tokens, prompt), tokens) for owner, tokens in self._kept if owner == origin]
        shared, tokens = max(found, default=(0, ()))
        shared = min(shared, len(prompt) - 1)
        if shared < max(SHORTEST, len(prompt) / 2):
            return None
        self._kept.move_to_end((origin, tokens))
        states = self._kept[origin, tokens]
        return CachedPrefix(tokens[:shared], tuple((keys[:, :shared], values[:, :shared]) for keys, values in states))

    def keep(self, origin: PrefixKey | None, tokens: tuple[int, ...], states: States) -> None:
        """Keep a copy of a row's keys and values (tokens of the row, each layer's states), if it fits the budget."""
        size = _size(states)
        if origin is None or len(tokens) < SHORTEST or size > self.budget:
            return
        for owner, other in [key for key in self._kept if key[0] == origin]:
            if other[: len(tokens)] == tokens:
                self._kept.move_to_end((owner, other))
                return
            if tokens[: len(other)] == other:
                self._pop((owner, other))
        while self.bytes + size > self.budget:
            self._pop(next(iter(self._kept)))
        self._kept[origin, tokens] = tuple((keys.clone(), values.clone()) for keys, values in states)
        self.bytes += size

    def forget(self, tenant: str, user: str) -> None:
        """Drop all of a user."""
        self._drop(lambda origin: (origin.tenant, origin.user) == (tenant, user))

    def owners(self) -> set[tuple[str, str]]:
        """Return tenant and user of all that is kept."""
        return {(origin.tenant, origin.user) for origin, _ in self._kept}

    def _drop(self, gone: Callable[[PrefixKey], bool]) -> None:
        for key in [key for key in self._kept if gone(key[0])]:
            self._pop(key)

    def _pop(self, key: tuple[PrefixKey, tuple[int, ...]]) -> None:
        self.bytes -= _size(self._kept.pop(key))


def _shared(one: Sequence[int], other: Sequence[int]) -> int:
    """Return how many tokens two rows begin with together."""
    length = min(len(one), len(other))
    return next((at for at in range(length) if one[at] != other[at]), length)


def _size(states: States) -> int:
    return sum(tensor.nbytes for pair in states for tensor in pair)
