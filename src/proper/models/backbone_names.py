"""Resolution of a config's `backbone` (embedded model, folder or model id), and its name in error messages."""

from __future__ import annotations

from importlib.resources import files
from pathlib import Path

from proper.errors import ConfigError
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
        raise ConfigError(f"backbone: there is no folder {name!r}")
    return name


def what(name: str) -> str:
    """Return a backbone's name for an error message, which tells whether it was taken as a folder."""
    if name == EMBEDDED or name in KNOWN:
        return repr(name)
    if name.endswith(SUFFIX):
        return f"file {name!r}"
    return f"folder {name!r}" if Path(name).is_dir() else f"{name!r}, which is no folder here,"


def first_line(error: Exception) -> str:
    """Return another library's error as one short line."""
    text = str(error).strip()
    # transformers suggests a Python argument; in proper it is a config key.
    if "trust_remote_code" in text:
        return "it needs Python code that lies beside its weights; trust_remote_code: true in the config runs that code"
    return text.splitlines()[0][:200].removesuffix(" from one of: ") if text else type(error).__name__
