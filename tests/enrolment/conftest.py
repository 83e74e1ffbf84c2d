"""Fixtures of the training tests: the config, the tokens and the prepared data of a small run."""

from __future__ import annotations

from tests.training.conftest import dataset, encoder, grouped, settings

__all__ = ["dataset", "encoder", "grouped", "settings"]
