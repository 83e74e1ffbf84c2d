"""Tokenizer of a backbone, read without the weights: location, tokenizer and end-of-answer tokens."""

from __future__ import annotations

from importlib.resources import files
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer
from transformers import AutoConfig, AutoTokenizer, GenerationConfig
from transformers.utils.hub import cached_file

from proper.config import Config
from proper.data.chat import special_names, uses_chat_template
from proper.data.encoder import Encoder
from proper.errors import ConfigError, first_line
from proper.models.gguf import SUFFIX, gguf_folder
from proper.models.known_backbones import KNOWN, fetched_folder

EMBEDDED = "proper-nano"


def backbone_location(name: str) -> str:
    """Return the folder or model id that transformers loads for a config's `backbone`.

    A GGUF file is de-quantized into the cache on the first call.

    Raises:
        ConfigError: the name can only be a folder or file that does not exist, is a known backbone that has not been
            downloaded, or is a GGUF file that cannot be read.
    """
    if name == EMBEDDED:
        return str(files("proper.models") / "nano")
    if name in KNOWN and not Path(name).is_dir():
        return str(fetched_folder(name))
    if name.endswith(SUFFIX):
        return str(gguf_folder(Path(name)))
    # A model id has at most one slash and begins with a letter or a digit.
    if not name or not Path(name).is_dir() and (name.count("/") > 1 or not name[:1].isalnum()):
        raise ConfigError(f"backbone: the folder {name!r} does not exist")
    return name


def what(name: str) -> str:
    """Return a backbone's name for an error message, which tells whether it was taken as a folder."""
    if name == EMBEDDED or name in KNOWN:
        return repr(name)
    if name.endswith(SUFFIX):
        return f"file {name!r}"
    return f"folder {name!r}" if Path(name).is_dir() else f"{name!r}, which is no folder here,"


def reason(error: Exception) -> str:
    """Return why transformers cannot load a backbone, as one short line."""
    # transformers suggests a Python argument; in proper it is a config key.
    if "trust_remote_code" in str(error):
        return "it needs Python code that lies beside its weights; trust_remote_code: true in the config runs that code"
    return first_line(error, 200).removesuffix(" from one of: ")


def load_tokenizer(name: str, *, trust_remote_code: bool = False) -> Any:
    """Load only the tokenizer of a backbone.

    Raises:
        ConfigError: the backbone has no tokenizer.
    """
    location, options = backbone_location(name), {"trust_remote_code": trust_remote_code}
    try:
        found = AutoTokenizer.from_pretrained(location, **options)
        # transformers corrects the pattern of Mistral's tokenizers only on request; otherwise it marks them and warns.
        if getattr(getattr(found, "backend_tokenizer", None), "fix_mistral_regex", None) is False:
            return AutoTokenizer.from_pretrained(location, fix_mistral_regex=True, **options)
        _split_as_its_file(found, location)
        return found
    except (OSError, ValueError, ImportError) as error:
        raise ConfigError(f"backbone: {what(name)} has no tokenizer: {reason(error)}") from error


def _split_as_its_file(found: Any, location: str) -> None:
    """Make a tokenizer split texts as its tokenizer.json says.

    Since version 5, many classes of transformers (GPT2Tokenizer, Qwen2Tokenizer, ...) read only vocabulary and merges
    from the file and bring their own normalizer and pre-tokenizer, whatever the model was trained with.
    """
    backend = getattr(found, "backend_tokenizer", None)
    if backend is None or not type(found).__module__.startswith("transformers."):
        return  # a class of the backbone's own knows what it does
    path = cached_file(location, "tokenizer.json", _raise_exceptions_for_missing_entries=False)
    if path is None:
        return
    wanted = Tokenizer.from_file(path)
    if _splitting(backend) != _splitting(wanted):
        # Not the post-processor: the class makes it of the special tokens in tokenizer_config.json.
        for part in ("model", "normalizer", "pre_tokenizer", "decoder"):
            setattr(backend, part, getattr(wanted, part))


def _splitting(tokenizer: Tokenizer) -> list[Any]:
    parts = [tokenizer.normalizer, tokenizer.pre_tokenizer]
    options = [getattr(tokenizer.model, name, None) for name in ("ignore_merges", "byte_fallback")]
    return [type(tokenizer.model), *options, *(None if part is None else part.__getstate__() for part in parts)]


def configured_encoder(config: Config) -> Encoder:
    """Return the encoder from texts to tokens of a config's backbone, without loading its weights.

    Raises:
        ConfigError: the tokenizer or model config is missing, or there is no end token.
    """
    name, trust = config.backbone, config.trust_remote_code
    tokenizer = load_tokenizer(name, trust_remote_code=trust)
    location = backbone_location(name)
    try:
        shape = AutoConfig.from_pretrained(location, trust_remote_code=trust)
    except (OSError, ValueError, ImportError) as error:
        raise ConfigError(f"backbone: {what(name)} cannot be loaded: {reason(error)}") from error
    try:
        habits = GenerationConfig.from_pretrained(location)
    except OSError:
        habits = None  # a few folders lack this file; the model config then names the end tokens
    rows = int(shape.get_text_config().vocab_size)
    ends = settle_ends(tokenizer, named_ends(shape, habits, rows), rows, name)
    chat = uses_chat_template(config.data.chat, tokenizer, name)
    return Encoder(tokenizer, config.compute.max_length, rows=rows, ends=ends, chat=chat)


def named_ends(config: Any, habits: GenerationConfig | None, rows: int) -> tuple[int, ...]:
    """Return the end token ids in the generation config and the model config that the model has embeddings for."""
    found: list[int] = []
    for source in (habits, config, config.get_text_config()):
        named = getattr(source, "eos_token_id", None)
        found += named if isinstance(named, list | tuple) else [] if named is None else [named]
    return tuple(dict.fromkeys(number for number in found if 0 <= number < rows))


def settle_ends(tokenizer: Any, named: tuple[int, ...], rows: int, name: str) -> tuple[int, ...]:
    """Return the ids that end an answer, the main one first, and set the tokenizer's `eos_token` to that one.

    The main one is the tokenizer's own end token, else the first that the configs name, else the separator token. The
    configs' other ids are used only if they are special tokens: an ordinary word is a default that does not fit this
    tokenizer.

    Raises:
        ConfigError: there is no end token: answers would be trained without an end, and would never stop.
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
