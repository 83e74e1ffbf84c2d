"""`Source`: a named, streaming origin of rows, such as one file."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

Row = dict[str, Any]


@dataclass(frozen=True)
class Source:
    """A named origin of rows.

    `columns` is None if they are unknown (no line of a JSONL file is an object). `read(columns)` yields
    (row number from 1, values by column), or an error text in place of the values of a bad row. `typed` is false if
    all values are text because the format has no numbers.
    """

    name: str
    columns: tuple[str, ...] | None
    read: Callable[[Sequence[str]], Iterator[tuple[int, Row | str]]]
    typed: bool = True
