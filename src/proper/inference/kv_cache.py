"""KV cache for continuous batching: right-aligned rows that join and leave, in one window of columns.

Rows are aligned on the right, as in a left-padded batch, so one decoding step writes one column and distances between
columns are distances between tokens (which sliding-window masks rely on). A new row is copied in so that it ends where
the others end; a row that leaves is replaced by the last one. Only when the window reaches the buffer's end is
everything moved back, once in `SLACK` steps. Rows share nothing.

Every column outside a row's own is zero, in every row of the buffer: attention reads the whole window, and a masked
value takes part with weight 0, which turns a NaN or infinity left by an earlier row into a NaN in this one. So a row is
zeroed when it leaves, and columns are zeroed when the window moves.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor
from transformers import Cache, DynamicCache
from transformers.cache_utils import DynamicLayer

from proper.inference.prefix_cache import States

SLACK = 128
"""Spare columns beyond `limit` (at most `limit` of them), which is the number of steps between two moves."""


@dataclass
class Window:
    """The columns of the buffers that are in use.

    Attributes:
        cursor: the column of the next token.
        lengths: cached tokens of each row, which end before `cursor`.
    """

    cursor: int
    lengths: list[int] = field(default_factory=list)

    @property
    def start(self) -> int:
        """The first column that any row uses."""
        return self.cursor - max(self.lengths, default=0)


class WindowLayer(DynamicLayer):  # type: ignore[no-untyped-call]
    """One layer's keys and values (rows, heads, columns, size), as a transformers cache layer over the window."""

    def __init__(self, window: Window, keys: Tensor, values: Tensor) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.window, self.k, self.v = window, keys, values
        # Read by the base class and by code that inspects a cache.
        self.keys, self.values = keys, values
        self.dtype, self.device, self.is_initialized = keys.dtype, keys.device, True

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Write one token of every row, and return the keys and values of the window, this token included."""
        rows, cursor = len(self.window.lengths), self.window.cursor
        self.k[:rows, :, cursor] = key_states[:, :, 0]
        self.v[:rows, :, cursor] = value_states[:, :, 0]
        span = slice(self.window.start, cursor + 1)
        return self.k[:rows, :, span], self.v[:rows, :, span]

    def get_seq_length(self) -> int:
        """Return the number of columns in use."""
        return self.window.cursor - self.window.start


class RowCache:
    """Keys and values of up to `rows` rows of at most `limit` tokens; the first `join` allocates the memory."""

    def __init__(self, rows: int, limit: int) -> None:
        self.rows, self.limit, self.columns = rows, limit, limit + min(SLACK, limit)
        self.window = Window(limit)
        self._layers: list[WindowLayer] = []

    def __len__(self) -> int:
        return len(self.window.lengths)

    def join(self, filled: DynamicCache, lengths: list[int]) -> None:
        """Append rows.

        Args:
            filled: the cache after a forward pass over left-padded prompts.
            lengths: tokens of each prompt.

        Raises:
            ValueError: the rows are too many or too long.
        """
        if len(self) + len(lengths) > self.rows or max(lengths) > self.limit:
            raise ValueError(f"no room for {len(lengths)} rows of up to {max(lengths)} tokens")
        states: list[tuple[Tensor, Tensor]] = [(layer.keys, layer.values) for layer in filled.layers]  # type: ignore
        if not self._layers:
            self._layers = [WindowLayer(self.window, *map(self._buffer, pair)) for pair in states]
        if not len(self):
            self.window.cursor = self.limit
        first, cursor = len(self), self.window.cursor
        try:
            for layer, (keys, values) in zip(self._layers, states, strict=True):
                for at, length in enumerate(lengths):
                    layer.k[first + at, :, cursor - length : cursor] = keys[at, :, -length:]
                    layer.v[first + at, :, cursor - length : cursor] = values[at, :, -length:]
        except BaseException:
            for at, length in enumerate(lengths):
                self._zero(first + at, length)
            raise
        self.window.lengths += lengths

    def leave(self, row: int) -> None:
        """Remove a row and zero its columns; the last row moves to its index."""
        last, window = len(self) - 1, self.window
        self._zero(row, window.lengths[row])
        if row != last:
            span = slice(window.cursor - window.lengths[last], window.cursor)
            for layer in self._layers:
                layer.k[row, :, span] = layer.k[last, :, span]
                layer.v[row, :, span] = layer.v[last, :, span]
            self._zero(last, window.lengths[last])
            window.lengths[row] = window.lengths[last]
        window.lengths.pop()

    def alone(self, row: int) -> RowCache:
        """Return a one-row cache on the same memory, with its own window: advancing it leaves the other rows as is."""
        one = RowCache(1, self.limit)
        one.window = Window(self.window.cursor, [self.window.lengths[row]])
        span = slice(row, row + 1)
        one._layers = [WindowLayer(one.window, layer.k[span], layer.v[span]) for layer in self._layers]
        return one

    def states(self, row: int) -> States:
        """Return views of a row's keys and values."""
        span = slice(self.window.cursor - self.window.lengths[row], self.window.cursor)
        return tuple((layer.k[row, :, span], layer.v[row, :, span]) for layer in self._layers)

    def make_room(self) -> None:
        """Ensure a column for the next token: at the end of the buffer all rows are moved back."""
        if self.window.cursor == self.columns:
            self._move_back()

    def step(self) -> tuple[Cache, Int[Tensor, "B T"], Int[Tensor, "B 1"]]:
        """Return the inputs of a forward pass over one token of every row: cache, attention mask and positions."""
        self.make_room()
        device = self._layers[0].device
        lengths = torch.tensor(self.window.lengths, device=device)[:, None]
        columns = torch.arange(self.window.cursor - self.window.start + 1, device=device)
        mask = (columns >= len(columns) - 1 - lengths).long()
        return Cache(layers=list(self._layers)), mask, lengths

    def advance(self) -> None:
        """Move the cursor past the column that the forward pass has written."""
        self.window.cursor += 1
        self.window.lengths[:] = [length + 1 for length in self.window.lengths]

    def _buffer(self, states: Float[Tensor, "B H T D"]) -> Float[Tensor, "B H T D"]:
        return states.new_zeros(self.rows, states.shape[1], self.columns, states.shape[3])

    def _move_back(self) -> None:
        start, cursor, rows = self.window.start, self.window.cursor, len(self)
        target = slice(self.limit - (cursor - start), self.limit)
        for layer in self._layers:
            layer.k[:rows, :, target] = layer.k[:rows, :, start:cursor].clone()
            layer.v[:rows, :, target] = layer.v[:rows, :, start:cursor].clone()
            layer.k[:rows, :, self.limit :] = 0
            layer.v[:rows, :, self.limit :] = 0
        self.window.cursor = self.limit

    def _zero(self, row: int, length: int) -> None:
        """Zero a row's tokens, and the next column, which a failed pass may have begun to write."""
        span = slice(self.window.cursor - length, self.window.cursor + 1)
        for layer in self._layers:
            layer.k[row, :, span] = 0
            layer.v[row, :, span] = 0
