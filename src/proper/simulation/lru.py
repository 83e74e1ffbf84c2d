"""LRU cache over numbers, and its stationary content under independent requests."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Container

import numpy as np
from numpy.typing import NDArray


class LruKeys:
    """The keys of an LRU cache of `capacity` entries, some of them pinned."""

    def __init__(self, capacity: int) -> None:
        self.capacity = capacity
        self._keys: OrderedDict[int, int] = OrderedDict()

    def __contains__(self, key: int) -> bool:
        return key in self._keys

    def __len__(self) -> int:
        return len(self._keys)

    def touch(self, key: int) -> None:
        """Make a key the most recently used."""
        self._keys.move_to_end(key)

    def add(self, key: int) -> None:
        """Add a key as the most recently used; there has to be room."""
        self._keys[key] = 0

    def pin(self, key: int) -> None:
        """Protect a key from eviction until `unpin`, and make it the most recently used."""
        self._keys[key] += 1
        self._keys.move_to_end(key)

    def unpin(self, key: int) -> None:
        """Undo one `pin`."""
        self._keys[key] -= 1

    def make_room(self, reserved: int = 0, keep: Container[int] = ()) -> bool:
        """Evict the least recently used key if the cache is full; False if every key is pinned or in `keep`.

        Args:
            reserved: entries that are promised to running loads.
            keep: keys that must not be evicted although they are not pinned.
        """
        if len(self._keys) + reserved < self.capacity:
            return True
        for key, pins in self._keys.items():
            if not pins and key not in keep:
                del self._keys[key]
                return True
        return False


def fill_stationary(cache: LruKeys, draw: Callable[[int], NDArray[np.int64]], most_draws: int) -> None:
    """Fill an empty cache with its stationary content under independent requests.

    At any moment an LRU cache holds the last `capacity` distinct keys. Seen backwards in time these are the first
    distinct ones of independent draws, so no warm-up is needed.

    Args:
        cache: an empty cache.
        draw: returns so many independent keys.
        most_draws: where the keys run out before the cache is full, this many draws end the search.
    """
    found: dict[int, None] = {}
    done = 0
    while len(found) < cache.capacity and done < most_draws:
        block = min(65_536, max(1024, 2 * (cache.capacity - len(found))), most_draws - done)
        for key in draw(block).tolist():
            found.setdefault(key)
        done += block
    for key in reversed(list(found)[: cache.capacity]):
        cache.add(key)
