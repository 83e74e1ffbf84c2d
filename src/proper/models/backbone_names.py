"""What a config's `backbone` names: the embedded model, a folder, or a model's id; and how errors speak of it."""

from __future__ import annotations

from importlib.resources import files
from pathlib import Path

from proper.errors import ConfigError

EMBEDDED = "proper-nano"


def backbone_location(name: str) -> str:
    """Return what transformers loads for a config's `backbone`.

    Raises:
        ConfigError: it can only be a folder, and there is none.
    """
    if name == EMBEDDED:
        return str(files("proper.models") / "nano")
    # A model's id has at most one slash and begins with a letter or a number.
    if not name or not Path(name).is_dir() and (name.count("/") > 1 or not name[:1].isalnum()):
        raise ConfigError(f"backbone: there is no folder {name!r}")
    return name


def what(name: str) -> str:
    """Name a backbone in an error, saying whether it was taken for a folder."""
    if name == EMBEDDED:
        return repr(name)
    return f"folder {name!r}" if Path(name).is_dir() else f"{name!r}, which is no folder here,"


def first_line(error: Exception) -> str:
    """Put another library's error into one short line."""
    text = str(error).strip()
    # transformers offers its users an argument; ours have a setting.
    if "trust_remote_code" in text:
        return "it needs Python code that lies beside its weights; trust_remote_code: true in the config runs that code"
    return text.splitlines()[0][:200].removesuffix(" from one of: ") if text else type(error).__name__
