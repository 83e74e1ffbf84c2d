"""Rows of one batch with different lengths, users and slots."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from proper.data.encoder import EncodedExample
from proper.layers.batch_context import RowContext
from proper.models.personal import ProperModel

LENGTHS = ((9, 3), (4, 1), (17, 5), (6, 2), (12, 4))
"""Prompt and answer lengths of the rows of a batch."""
SLOTS = (0, 2, -1, 1, 0)


def rows_of(lengths: Sequence[tuple[int, int]] = LENGTHS) -> list[EncodedExample]:
    generator = torch.Generator().manual_seed(7)
    made = []
    for at, (prompt, answer) in enumerate(lengths):
        ids = torch.randint(3, 8000, (prompt + answer,), generator=generator)
        made.append(EncodedExample(f"user {at}", tuple(ids.tolist()), prompt))
    return made


def embeddings(model: ProperModel, rows: int = len(LENGTHS)) -> Tensor:
    return torch.randn(rows, model.embedding_size, generator=torch.Generator().manual_seed(3))


def mixed(model: ProperModel, mode: str = "users") -> RowContext:
    return RowContext(mode, embedding=embeddings(model), slots=torch.tensor(SLOTS))  # type: ignore[arg-type]
