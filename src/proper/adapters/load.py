"""Loads adapters from the store directly into rows of an adapter bank: each byte is copied once and checksummed.

An adapter stored as a row has it (one dtype, the layout's order) is read into the row, or converted into it piece by
piece while the piece is still in the core's cache. Any other form (int8, for example) is unpacked to tensors first.
"""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from proper.adapters.manifest import ManifestRow
from proper.adapters.records import Head, head_of
from proper.adapters.serialization import TensorSpec, is_sound, require_sound
from proper.adapters.shards import CHUNK
from proper.adapters.store import AdapterStore
from proper.errors import StoreError
from proper.layers.layout import Layout


class RowLoader:
    """Loads users' adapters into bank rows of one layout. Not thread-safe: use it from one thread at a time."""

    def __init__(self, store: AdapterStore, layout: Layout) -> None:
        self.store, self.layout = store, layout
        self._wanted = [(name, shape) for name, (_, shape) in layout.stacks().items()]
        self._straight: dict[int | None, torch.dtype | None] = {}
        self._buffer = torch.empty(CHUNK, dtype=torch.uint8)

    def load(self, user: str, row: Float[Tensor, "P"]) -> Head | None:
        """Fill a row with a user's adapter; return the head of the record it was read from.

        Returns None for an unknown user, and a head of tier "groups" if there is no adapter; both zero the row.

        Raises:
            StoreError: adapter or embedding is damaged, does not fit the layout or has numbers that are not finite or
                absurdly large; the row is zeroed.
        """
        head = None
        try:
            head = self.store.read(user, lambda found: self._fill(user, found, row))
        finally:
            if head is None or head.checksum is None:
                row.zero_()
        return head

    def _fill(self, user: str, found: ManifestRow, row: Float[Tensor, "P"]) -> Head:
        if self._load(user, found, row) is not None and not is_sound(row):
            require_sound(user, self.layout.unpack(row))
        head = head_of(found)
        require_sound(user, {"embedding": head.embedding})
        return head

    def _load(self, user: str, found: ManifestRow, row: Float[Tensor, "P"]) -> bytes | None:
        if found.place is None:
            return None
        dtype = self._dtype(found)
        if dtype is None:
            adapter = self.store.record(user, found).adapter
            assert adapter is not None
            try:
                self.layout.pack(adapter, row)
            except ValueError as error:
                raise StoreError(f"the adapter of user {user!r} does not fit: {error}") from error
        elif dtype == row.dtype and row.device.type == "cpu":
            self.store.shards.fill(found, row.view(torch.uint8).numpy().data)
        else:
            self._convert(found, dtype, row)
        return found.xxh3

    def _convert(self, found: ManifestRow, dtype: torch.dtype, row: Float[Tensor, "P"]) -> None:
        piece, size = self._buffer.view(dtype), dtype.itemsize

        def take(at: int, count: int) -> None:
            row[at // size : (at + count) // size].copy_(piece[: count // size])

        self.store.shards.stream(found, self._buffer.numpy().data, take)

    def _dtype(self, found: ManifestRow) -> torch.dtype | None:
        """Return the dtype of an adapter that is stored as a row has it; None for any other form."""
        if found.layout not in self._straight:
            self._straight[found.layout] = self._compare(self.store.spec(found))
        return self._straight[found.layout]

    def _compare(self, spec: TensorSpec) -> torch.dtype | None:
        dtypes = {entry.dtype for entry in spec.entries}
        same = [(entry.name, entry.shape) for entry in spec.entries] == self._wanted
        return dtypes.pop() if same and len(dtypes) == 1 else None
