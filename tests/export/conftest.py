"""Fixtures of the adapters' and the engine's tests: a layout, random adapters, and a tiny model of all stages."""

from __future__ import annotations

from tests.adapters.conftest import adapter, layout
from tests.inference.conftest import personal

__all__ = ["adapter", "layout", "personal"]
