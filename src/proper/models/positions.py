"""How many positions a model has a row for, where its positions are a table (GPT-2, OPT) and not a formula (RoPE).

A row of a text beyond the table's end has no position: an index error, in the middle of an answer. Knows nothing about
rows or runs.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from proper.errors import ConfigError

_SPARE = 8
"""Rows that a table may have before its first position (OPT: 2)."""
_TABLE = "embed_positions"  # a buffer of sines that some families look up (GPT-J, CodeGen)


def positions_of(model: nn.Module) -> int | None:
    """Return the positions of a model's table; None if it has none, so that its rows may be of any length."""
    config: Any = model.config
    most: int | None = getattr(config.get_text_config(), "max_position_embeddings", None)
    if most is None:
        return None
    tokens = model.get_input_embeddings()  # type: ignore[operator]
    tables = [each.weight for each in model.modules() if isinstance(each, nn.Embedding) and each is not tokens]
    tables += [buffer for name, buffer in model.named_buffers() if name.rpartition(".")[2] == _TABLE]
    return most if any(_is_table(table, most) for table in tables) else None


def require_positions(model: nn.Module, length: int) -> None:
    """See that a model has a position for each token of rows of `length` tokens.

    Raises:
        ConfigError: its table of positions is shorter; names both lengths.
    """
    most = positions_of(model)
    if most is not None and length > most:
        raise ConfigError(f"compute.max_length: rows may have {length} tokens, but the backbone has {most} positions")


def _is_table(weight: Tensor, most: int) -> bool:
    return weight.ndim == 2 and most <= weight.shape[0] <= most + _SPARE
