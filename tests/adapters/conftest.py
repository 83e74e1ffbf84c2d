"""A layout of two modules, and users with random adapters for it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor

from proper.adapters.store import AdapterStore, UserRecord
from proper.layers.layout import Layout


@pytest.fixture(scope="session")
def layout() -> Layout:
    return Layout.of({"h.0.up": (4, 6), "h.1.up": (4, 6), "h.0.down": (6, 4), "h.1.down": (6, 4)}, 2)


@pytest.fixture(scope="session")
def adapter(layout: Layout) -> Callable[[int], dict[str, Tensor]]:
    """`adapter(seed)`: the tensors of one user."""

    def draw(seed: int) -> dict[str, Tensor]:
        return layout.unpack(torch.randn(layout.width, generator=torch.Generator().manual_seed(seed)))

    return draw


@pytest.fixture
def store(users: Path) -> Iterator[AdapterStore]:
    opened = AdapterStore(users)
    yield opened
    opened.close()


@pytest.fixture
def filled(store: AdapterStore, adapter: Callable[[int], dict[str, Tensor]]) -> AdapterStore:
    """Five users with adapters (u0 to u4) and one on the group tier (g)."""
    store.put(UserRecord(f"u{at}", "users", torch.full((3,), float(at)), adapter(at)) for at in range(5))
    store.put([UserRecord("g", "groups", torch.full((3,), 9.0))])
    return store
