"""A row that is filled straight from the files holds what `get` and `pack` would have put there."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from proper.adapters import shards
from proper.adapters.load import RowLoader
from proper.adapters.quantization import Storage, encode
from proper.adapters.store import AdapterStore, UserRecord
from proper.errors import StoreError
from proper.layers.layout import Layout

Draw = Callable[[int], dict[str, Tensor]]


@pytest.mark.parametrize("storage", ["bf16", "fp32", "int8"])
@pytest.mark.parametrize("slot", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("file_bytes", [0, 1 << 20], ids=["file", "shard"])
def test_every_form_into_every_slot(
    tmp_path: Path, layout: Layout, adapter: Draw, storage: Storage, slot: torch.dtype, file_bytes: int
) -> None:
    store = AdapterStore(tmp_path, file_bytes=file_bytes)
    store.put([UserRecord(f"u{at}", "users", torch.zeros(1), encode(adapter(at), storage)) for at in range(3)])
    loader = RowLoader(store, layout)
    for at in range(3):
        record, head = store.get(f"u{at}"), store.head(f"u{at}")
        assert record is not None and record.adapter is not None and head is not None
        wanted, row = torch.empty(layout.width, dtype=slot), torch.full((layout.width,), 7.0, dtype=slot)
        layout.pack(record.adapter, wanted)
        found = loader.load(f"u{at}", row)
        assert found is not None and found.checksum == head.checksum
        assert torch.equal(row, wanted)
    store.close()


@pytest.mark.parametrize("slot", [torch.float32, torch.bfloat16])
def test_adapters_of_several_pieces(tmp_path: Path, slot: torch.dtype) -> None:
    layout = Layout.of({"h.0.up": (shards.CHUNK // 3, 5), "h.1.up": (shards.CHUNK // 3, 5)}, 3)
    row = torch.randn(layout.width, generator=torch.Generator().manual_seed(0)).bfloat16()
    assert row.numel() * 2 > 2 * shards.CHUNK and row.numel() * 2 % shards.CHUNK
    store = AdapterStore(tmp_path)
    store.put([UserRecord("a", "users", torch.zeros(1), layout.unpack(row))])
    found = torch.zeros(layout.width, dtype=slot)
    RowLoader(store, layout).load("a", found)
    assert torch.equal(found, row.to(slot))
    store.close()


def test_another_order_is_put_in_order(store: AdapterStore, layout: Layout, adapter: Draw) -> None:
    turned = dict(reversed(adapter(1).items()))
    store.put([UserRecord("a", "users", torch.zeros(1), turned)])
    row, wanted = torch.zeros(layout.width), torch.zeros(layout.width)
    RowLoader(store, layout).load("a", row)
    layout.pack(adapter(1), wanted)
    assert torch.equal(row, wanted)


@pytest.mark.parametrize("slot", [torch.float32, torch.bfloat16])
def test_a_row_that_cannot_be_filled_is_zero(filled: AdapterStore, layout: Layout, slot: torch.dtype) -> None:
    (path,) = filled.paths.blobs.iterdir()
    data = bytearray(path.read_bytes())
    data[layout.width * 4 - 1] ^= 64  # the last byte of u0
    path.write_bytes(data)
    loader, row = RowLoader(filled, layout), torch.full((layout.width,), 7.0, dtype=slot)
    with pytest.raises(StoreError, match="the adapter of user 'u0' is missing or damaged: its checksum differs"):
        loader.load("u0", row)
    assert not row.any()
    loader.load("u1", row)
    assert row.any()
    for user in ("g", "nobody"):
        found = loader.load(user, row)
        assert (found is None or found.tier == "groups") and not row.any()
