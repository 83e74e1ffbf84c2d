"""GGUF backbones: a `.gguf` file, de-quantized once into a transformers folder in the cache.

The folder has bf16 weights as safetensors, the tokenizer with its chat template, and the generation config, so that
everything above loads it like any other backbone. llama.cpp's formats are read by transformers and the package `gguf`.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from proper.console import progress
from proper.errors import ConfigError, ProperError, first_line
from proper.files import atomic_folder

SUFFIX = ".gguf"
_SAMPLE = 1 << 20  # bytes at the begin, the middle and the end of a file that its digest is of
_FORMAT = 2
"""Version of what a folder in the cache holds: 1 was without the scaling of RoPE."""


def cache_folder() -> Path:
    """Return the folder of downloaded and de-quantized backbones: `PROPER_CACHE`, else `proper` in the user's cache.

    Raises:
        ConfigError: there is no home folder and neither `PROPER_CACHE` nor `XDG_CACHE_HOME` is set.
    """
    named, shared = os.environ.get("PROPER_CACHE"), os.environ.get("XDG_CACHE_HOME")
    if named:
        return Path(named)
    if shared:
        return Path(shared) / "proper"
    try:
        return Path.home() / ".cache" / "proper"
    except RuntimeError as error:
        raise ConfigError("no home folder for the cache of backbones; set PROPER_CACHE to a folder") from error


def gguf_folder(path: Path) -> Path:
    """Return the transformers folder of a GGUF file; the first call de-quantizes it into the cache.

    Raises:
        ConfigError: the file does not exist or cannot be read, its architecture is not supported, or the package
            `gguf` is missing.
        ProperError: the cache cannot be written.
    """
    if not path.is_file():
        raise ConfigError(f"backbone: the file {str(path)!r} does not exist")
    folder = cache_folder() / "gguf" / f"{path.stem}-{_fingerprint(path)}"
    if not (folder / "config.json").is_file():
        try:
            folder.parent.mkdir(parents=True, exist_ok=True)
            with atomic_folder(folder, shared=True) as made:
                dequantize(path, made)
        except OSError as error:
            raise ProperError(f"{folder}: cannot be written: {error.strerror or error}") from error
    return folder


def dequantize(path: Path, folder: Path) -> None:
    """Write the model and tokenizer of a GGUF file into an existing folder, in transformers' format and bf16.

    Raises:
        ConfigError: the file cannot be read, its architecture is not supported, a weight is missing (the others are in
            further files, for example), or the package `gguf` is missing.
    """
    if find_spec("gguf") is None:
        raise ConfigError(f"backbone: {path.name}: GGUF files need the extra 'gguf': pip install 'proper-llm[gguf]'")
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, GgufConfig

    from proper.models.gguf_rope import scale_rope

    where = str(path.parent.resolve())
    options: dict[str, Any] = {"gguf_file": path.name}
    with progress(f"de-quantizing {path.name}", 3) as advance:
        try:
            tokenizer = AutoTokenizer.from_pretrained(where, **options)
            advance(1, "tokenizer")
            shape = AutoConfig.from_pretrained(where, **options)
            scale_rope(shape, path)
            options |= {"quantization_config": GgufConfig(dequantize=True), "output_loading_info": True}
            loaded: Any = AutoModelForCausalLM.from_pretrained(where, config=shape, dtype=torch.float32, **options)
            advance(1, "weights")
        except (OSError, ValueError, KeyError, ImportError, RuntimeError, NotImplementedError) as error:
            reason = first_line(error, 200)
            raise ConfigError(f"backbone: {path} cannot be de-quantized: {reason}") from error
        model, found = loaded
        require_weights(found, f"the file {str(path)!r}")
        # The compute dtype is bf16 by default, and a file of bf16 is half the size.
        model.to(torch.bfloat16).save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        advance(1, "written")


def require_weights(found: Mapping[str, Any], what: str) -> None:
    """Check transformers' report of a load: it initializes missing weights at random and only warns about it.

    Raises:
        ConfigError: a weight is missing or misshapen.
    """
    wrong = sorted(found["missing_keys"]) + sorted(key for key, *_ in found["mismatched_keys"])
    if wrong:
        raise ConfigError(f"backbone: {what}: {len(wrong)} weights are missing or misshapen, first {wrong[0]}")


def _fingerprint(path: Path) -> str:
    """Return a hash of `_FORMAT`, a file's size and its first, middle and last mebibyte: files may have gigabytes."""
    size = path.stat().st_size
    state = hashlib.sha256(f"{_FORMAT} {size}".encode())
    with path.open("rb") as file:
        for start in (0, size // 2, max(0, size - _SAMPLE)):
            file.seek(start)
            state.update(file.read(_SAMPLE))
    return state.hexdigest()[:16]
