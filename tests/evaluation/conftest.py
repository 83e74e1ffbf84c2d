"""Predictions made up quickly."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import pytest

from proper.evaluation.metrics import Prediction

Maker = Callable[[Sequence[tuple[str, str, str]]], list[Prediction]]


@pytest.fixture(scope="session")
def make() -> Maker:
    """Return a function from (user, target, prediction) rows to predictions with ids 0, 1, ..."""

    def build(rows: Sequence[tuple[str, str, str]]) -> list[Prediction]:
        return [
            Prediction(id=id_, user=user, prompt=f"prompt {id_}", target=target, prediction=prediction)
            for id_, (user, target, prediction) in enumerate(rows)
        ]

    return build
