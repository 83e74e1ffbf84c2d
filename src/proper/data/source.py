"""What rows come from, under one name. Knows nothing about files."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

Row = dict[str, Any]


@dataclass(frozen=True)
class Source:
    """Rows under one name.

    `columns` is None where nothing tells them (no line of a JSONL file is an object). `read(columns)` yields
    (row number from 1, values by column), or what is wrong with the row instead of its values. `typed` is false where
    all values are text because the format has no numbers.
    """

    name: str
    columns: tuple[str, ...] | None
    read: Callable[[Sequence[str]], Iterator[tuple[int, Row | str]]]
    typed: bool = True
