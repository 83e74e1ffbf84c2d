"""What the tests of the layers share: seeded random tensors, and a comparison that reads well."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor


@pytest.fixture(scope="session")
def draws() -> Callable[..., Callable[..., Tensor]]:
    """`draws(seed)` gives a function of shapes; each call returns the next standard normal tensor of the seed."""

    def seeded(seed: int, dtype: torch.dtype = torch.float32) -> Callable[..., Tensor]:
        generator = torch.Generator().manual_seed(seed)
        return lambda *shape: torch.randn(shape, generator=generator).to(dtype)

    return seeded


@pytest.fixture(scope="session")
def close() -> Callable[..., None]:
    """Compare by the distance relative to the expected tensor's norm; names what differs."""

    def check(name: str, found: Tensor | None, expected: Tensor | None, tolerance: float = 1e-5) -> None:
        assert (found is None) == (expected is None), name
        if found is None or expected is None:
            return
        assert found.shape == expected.shape, f"{name}: {tuple(found.shape)} is not {tuple(expected.shape)}"
        distance = (found.double() - expected.double()).detach().norm()
        scale = max(float(expected.detach().double().norm()), 1e-3)
        assert float(distance) <= tolerance * scale, f"{name}: off by {float(distance / scale):.2e} of its norm"

    return check
