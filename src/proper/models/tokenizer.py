"""Loading a backbone's tokenizer, and which tokens end an answer.

Knows nothing about weights.
"""

from __future__ import annotations

from typing import Any

from transformers import AutoConfig, AutoTokenizer, GenerationConfig

from proper.config import Config
from proper.data.batching import Encoder
from proper.data.special_tokens import special_names
from proper.errors import ConfigError
from proper.models.backbone_names import backbone_location, first_line, what


def load_tokenizer(name: str, *, trust_remote_code: bool = False) -> Any:
    """Load only the tokenizer of a backbone.

    Raises:
        ConfigError: there is none.
    """
    try:
        return AutoTokenizer.from_pretrained(backbone_location(name), trust_remote_code=trust_remote_code)
    except (OSError, ValueError, ImportError) as error:
        raise ConfigError(f"backbone: {what(name)} has no tokenizer: {first_line(error)}") from error


def configured_encoder(config: Config) -> Encoder:
    """Return what turns texts into tokens of a config's backbone, without loading its weights.

    Raises:
        ConfigError: there is no tokenizer or config, or answers have no end.
    """
    name, trust = config.backbone, config.trust_remote_code
    tokenizer = load_tokenizer(name, trust_remote_code=trust)
    location = backbone_location(name)
    try:
        shape = AutoConfig.from_pretrained(location, trust_remote_code=trust)
    except (OSError, ValueError, ImportError) as error:
        raise ConfigError(f"backbone: {what(name)} cannot be loaded: {first_line(error)}") from error
    try:
        habits = GenerationConfig.from_pretrained(location)
    except OSError:
        habits = None  # few folders lack the file; the config names the end then
    rows = int(shape.get_text_config().vocab_size)
    ends = settle_ends(tokenizer, named_ends(shape, habits, rows), rows, name)
    return Encoder(tokenizer, config.compute.max_length, rows=rows, ends=ends)


def named_ends(config: Any, habits: GenerationConfig | None, rows: int) -> tuple[int, ...]:
    """Return the ids that generation config and config say end an answer, of those that the model has."""
    found: list[int] = []
    for source in (habits, config, config.get_text_config()):
        named = getattr(source, "eos_token_id", None)
        found += named if isinstance(named, list | tuple) else [] if named is None else [named]
    return tuple(dict.fromkeys(number for number in found if 0 <= number < rows))


def settle_ends(tokenizer: Any, named: tuple[int, ...], rows: int, name: str) -> tuple[int, ...]:
    """Return the ids that end an answer, and see that the tokenizer has an end token that the model knows.

    That is its own, the first that the configs name, or its separator. Further ids that the configs name end an answer
    if they are special tokens: an ordinary word is a default that does not fit this tokenizer.

    Raises:
        ConfigError: there is none: answers would be trained without an end, and never stop.
    """
    for number in (tokenizer.eos_token_id, *named, getattr(tokenizer, "sep_token_id", None)):
        if number is None or not 0 <= number < rows:
            continue
        token = tokenizer.convert_ids_to_tokens(number)
        if token is not None:
            if number != tokenizer.eos_token_id:
                tokenizer.eos_token = token
            special = set(special_names(tokenizer).values())
            return number, *(other for other in named if other in special - {number})
    raise ConfigError(
        f"backbone: {what(name)}: neither its tokenizer (eos_token, sep_token) nor its config (eos_token_id) names an "
        f"end token among the model's {rows} embeddings, so that answers would never stop"
    )
