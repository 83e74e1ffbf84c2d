"""Who of those that wait goes next: in order of arrival, but whoever's adapter is in a slot may pass one whose is not.

Nobody is passed more than `patience` times, so nobody starves. Knows nothing about models, slots or time.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Generic, Protocol, TypeVar


class Sized(Protocol):
    """Something that waits, with a number of tokens to compute before its first answer."""

    @property
    def size(self) -> int: ...  # noqa: D102


T = TypeVar("T", bound=Sized)


@dataclass
class _Place(Generic[T]):
    item: T
    passed: int = 0


@dataclass
class Waiting(Generic[T]):
    """A line with passing.

    Attributes:
        patience: how often one may be passed.
    """

    patience: int
    _line: list[_Place[T]] = field(default_factory=list)

    def __len__(self) -> int:
        return len(self._line)

    def add(self, item: T) -> None:
        """Put at the end."""
        self._line.append(_Place(item))

    def items(self) -> list[T]:
        """Return all, the longest waiting first."""
        return [place.item for place in self._line]

    def remove(self, gone: Callable[[T], bool]) -> list[T]:
        """Take out those who will not wait any longer."""
        left = [place.item for place in self._line if gone(place.item)]
        self._line = [place for place in self._line if not gone(place.item)]
        return left

    def take(self, rows: int, tokens: int, ready: Callable[[T], bool]) -> list[T]:
        """Take those who go now.

        Args:
            rows: how many at most.
            tokens: how many tokens they may have together, padded to the longest; one may always go.
            ready: whether one can go; called in order, and taken at its word.
        """
        taken: list[T] = []
        kept: list[_Place[T]] = []
        longest = 0
        for at, place in enumerate(self._line):
            if len(taken) == rows or any(other.passed >= self.patience for other in kept):
                kept += self._line[at:]
                break
            width = max(longest, place.item.size)
            if taken and width * (len(taken) + 1) > tokens:
                kept += self._line[at:]
                break
            if not ready(place.item):
                kept.append(place)
                continue
            for other in kept:
                other.passed += 1
            taken.append(place.item)
            longest = width
        self._line = kept
        return taken
