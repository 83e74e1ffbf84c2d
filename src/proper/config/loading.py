"""Loading of configs: YAML files with overrides, or nested plain values, as a validated `Config`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import ValidationError

from proper.config.errors import explain
from proper.config.lamp_tasks import lamp_defaults
from proper.config.presets import PRESETS
from proper.config.schema import Config
from proper.errors import ConfigError


def load_config(path: Path, overrides: Sequence[str] = ()) -> Config:
    """Read a YAML config and apply `key.subkey=value` overrides; overrides win over the file, the file over a preset.

    A relative `data.path`, `data.train_without` or `backbone` that does not exist below the current folder is looked up
    beside the config.

    Raises:
        ConfigError: the file is missing or not YAML, a key is unknown, a value impossible.
    """
    raw = read_yaml(path)
    for override in overrides:
        _apply(raw, override)
    _resolve_paths(raw, path.parent)
    return make_config(raw, str(path))


def read_yaml(path: Path) -> dict[str, Any]:
    """Read a YAML file whose top level is a mapping of sections.

    Raises:
        ConfigError: the file is missing, not YAML or no mapping; the message names file and line.
    """
    try:
        raw = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read: {error.strerror}") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        line = getattr(getattr(error, "problem_mark", None), "line", None)
        where = f"{path}:{line + 1}" if line is not None else str(path)
        problem = getattr(error, "problem", None) or str(error).splitlines()[0]
        raise ConfigError(f"{where}: not YAML: {problem}") from error
    if not isinstance(raw, dict):
        found = "empty" if raw is None else f"a {type(raw).__name__}"
        raise ConfigError(f"{path}: a config is a mapping of sections, this is {found}")
    return raw


def load_run_config(path: Path) -> Config:
    """Read the config of a run folder. A run that does not say whether it uses the chat template was made without it.

    Raises:
        ConfigError: see `load_config`.
    """
    config = load_config(path)
    return config if "chat" in config.data.model_fields_set else with_chat(config, "off")


def with_chat(config: Config, chat: Literal["on", "off"]) -> Config:
    """Return a config with this choice of `data.chat`."""
    return config.with_data(lambda data: data.model_copy(update={"chat": chat}))


def make_config(raw: dict[str, Any], source: str = "config") -> Config:
    """Validate nested plain values as a `Config`; keys that they lack come from the named preset, then from defaults.

    Raises:
        ConfigError: a key is unknown or a value impossible; the message names the key as `section.key`.
    """
    preset = raw.get("preset")
    merged = _merge(PRESETS[preset], raw) if isinstance(preset, str) and preset in PRESETS else raw
    merged = _merge(lamp_defaults(raw.get("data")), merged)
    try:
        return Config.model_validate(merged)
    except ValidationError as error:
        raise ConfigError(f"{source}: {explain(error, Config)}") from error


def _apply(raw: dict[str, Any], override: str) -> None:
    key, separator, text = override.partition("=")
    if not separator or not key.strip():
        raise ConfigError(f"--set {override}: write it as section.key=value")
    *sections, last = key.strip().split(".")
    values = raw
    for section in sections:
        inner = values.get(section)
        if not isinstance(inner, dict):
            inner = values[section] = {}
        values = inner
    try:
        values[last] = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ConfigError(f"--set {override}: the value is not YAML") from error


def _resolve_paths(raw: dict[str, Any], folder: Path) -> None:
    tasks = raw.get("tasks")
    specs = [raw, *(tasks.values() if isinstance(tasks, dict) else ())]
    found = [spec["data"] for spec in specs if isinstance(spec, dict) and isinstance(spec.get("data"), dict)]
    sections = [(data, key) for data in found for key in ("path", "train_without")]
    for section, key in [*sections, (raw, "backbone")]:
        value = section.get(key)
        if isinstance(value, str) and not Path(value).exists() and (folder / value).exists():
            section[key] = str((folder / value).resolve())


def _merge(under: dict[str, Any], over: dict[str, Any]) -> dict[str, Any]:
    merged = dict(under)
    for key, value in over.items():
        below = merged.get(key)
        merged[key] = _merge(below, value) if isinstance(below, dict) and isinstance(value, dict) else value
    return merged
