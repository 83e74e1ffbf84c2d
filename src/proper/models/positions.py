"""Maximum length of models with a table of positions (GPT-2, OPT) instead of a formula (RoPE).

A token beyond the table's end has no position, which is an index error in the middle of an answer.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from proper.errors import ConfigError

_SPARE = 8
"""Maximum extra rows of a table before its first position (OPT: 2)."""
_TABLE = "embed_positions"  # buffer with sinusoidal positions (GPT-J, CodeGen)


def positions_of(model: nn.Module) -> int | None:
    """Return the number of positions in a model's table; None without a table, where rows may have any length."""
    config: Any = model.config
    most: int | None = getattr(config.get_text_config(), "max_position_embeddings", None)
    if most is None:
        return None
    tokens = model.get_input_embeddings()  # type: ignore[operator]
    tables = [each.weight for each in model.modules() if isinstance(each, nn.Embedding) and each is not tokens]
    tables += [buffer for name, buffer in model.named_buffers() if name.rpartition(".")[2] == _TABLE]
    return most if any(_is_table(table, most) for table in tables) else None


def require_positions(model: nn.Module, length: int) -> None:
    """Check that a model has positions for rows of `length` tokens.

    Raises:
        ConfigError: the position table is shorter; the message names both lengths.
    """
    most = positions_of(model)
    if most is not None and length > most:
        raise ConfigError(f"compute.max_length: rows may have {length} tokens, but the backbone has {most} positions")


def _is_table(weight: Tensor, most: int) -> bool:
    return weight.ndim == 2 and most <= weight.shape[0] <= most + _SPARE
