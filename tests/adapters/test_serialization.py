"""Tensors to bytes and back, and into files that safetensors itself reads."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.strategies import DrawFn
from safetensors.torch import load_file
from torch import Tensor

from proper.adapters.serialization import TensorSpec, pack, unpack
from proper.adapters.store import AdapterStore, UserRecord
from proper.errors import StoreError

DTYPES = [torch.float32, torch.bfloat16, torch.int8, torch.float64, torch.float16]


@st.composite
def adapters(draw: DrawFn) -> dict[str, Tensor]:
    names = draw(st.lists(st.text(min_size=1, max_size=8), unique=True, max_size=5))
    found = {}
    for at, name in enumerate(names):
        shape = draw(st.lists(st.integers(0, 4), max_size=3))
        numbers = torch.randn(shape, generator=torch.Generator().manual_seed(at)) * 50
        found[name] = numbers.to(draw(st.sampled_from(DTYPES)))
    return found


@given(adapter=adapters())
def test_round_trip(adapter: dict[str, Tensor]) -> None:
    spec, data = pack(adapter)
    assert TensorSpec.parse(spec.text()) == spec and spec.size == len(data)
    back = unpack(spec, torch.frombuffer(bytearray(data) or bytearray(1), dtype=torch.uint8)[: len(data)])
    assert back.keys() == adapter.keys()
    for name, tensor in adapter.items():
        assert back[name].dtype == tensor.dtype and torch.equal(back[name], tensor)


def test_an_adapter_of_one_dtype_keeps_its_order() -> None:
    adapter = {"z": torch.arange(3.0), "a": torch.arange(2.0), "m": torch.arange(4.0)}
    spec, data = pack(adapter)
    assert [entry.name for entry in spec.entries] == ["z", "a", "m"]
    assert data == torch.cat(list(adapter.values())).numpy().tobytes()


def test_views_and_transposes_are_stored_by_value() -> None:
    whole = torch.arange(12.0).view(3, 4)
    spec, data = pack({"t": whole.T, "row": whole[1]})
    back = unpack(spec, torch.frombuffer(bytearray(data), dtype=torch.uint8))
    assert torch.equal(back["t"], whole.T) and torch.equal(back["row"], whole[1])


def test_a_dtype_without_a_place_is_refused() -> None:
    with pytest.raises(StoreError, match=r"x: an adapter of torch\.complex64 cannot be stored"):
        pack({"x": torch.zeros(2, dtype=torch.complex64)})


@pytest.mark.parametrize("text", ["{", '[["a", "F99", [1]]]', "[1]", "null", '[["a", "F32"]]'])
def test_other_text_is_no_layout(text: str) -> None:
    with pytest.raises(ValueError):
        TensorSpec.parse(text)


@given(adapter=adapters())
def test_a_large_adapter_is_a_file_that_safetensors_reads(
    tmp_path_factory: pytest.TempPathFactory, adapter: dict[str, Tensor]
) -> None:
    store = AdapterStore(tmp_path_factory.mktemp("store"), file_bytes=-1)
    store.put([UserRecord("a", "users", torch.zeros(1), adapter)])
    (path,) = store.paths.blobs.iterdir()
    read = load_file(path)
    assert read.keys() == adapter.keys() and all(torch.equal(read[name], adapter[name]) for name in adapter)
    store.close()
