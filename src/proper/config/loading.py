"""Loading of configs: YAML files with overrides, or nested plain values, as a validated `Config`."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import ValidationError

from proper.config.errors import explain, takes_text
from proper.config.lamp_tasks import lamp_defaults
from proper.config.presets import PRESETS
from proper.config.schema import Config
from proper.errors import ConfigError, first_line


def load_config(path: Path, overrides: Sequence[str] = ()) -> Config:
    """Read a YAML config and apply `key.subkey=value` overrides; overrides win over the file, the file over a preset.

    An override of a setting that is a text is taken as it is; in quotes, or for another setting, it is YAML.

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
        raw = _yaml(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read: {error.strerror}") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        line = getattr(getattr(error, "problem_mark", None), "line", None)
        where = f"{path}:{line + 1}" if line is not None else str(path)
        problem = getattr(error, "problem", None) or first_line(error)
        raise ConfigError(f"{where}: not YAML: {problem}") from error
    if not isinstance(raw, dict):
        found = "empty" if raw is None else f"a {type(raw).__name__}"
        raise ConfigError(f"{path}: a config is a mapping of sections, this is {found}")
    return raw


class _Loader(yaml.SafeLoader):
    """YAML loader that refuses a key that occurs twice in a mapping, and reports every bad value with its line."""

    def construct_object(self, node: yaml.Node, deep: bool = False) -> Any:
        try:
            found = super().construct_object(node, deep)
            if isinstance(found, int) and abs(found) >= 2**63:  # SQLite's integers end there
                raise ValueError("too large a number")
            return found
        # PyYAML lets errors of the conversions through: `2024-02-30` is a ValueError, `!!bool x` a KeyError.
        except (ValueError, LookupError, AttributeError, RecursionError) as error:
            shown = node.value if isinstance(node.value, str) else "this"
            raise yaml.constructor.ConstructorError(
                None, None, f"{shown[:40]!r} is not a value ({error}); write a text in quotes", node.start_mark
            ) from error

    def compose_mapping_node(self, anchor: Any) -> yaml.MappingNode:
        node = super().compose_mapping_node(anchor)
        seen = set[str]()
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode):
                if key.value in seen:
                    raise yaml.composer.ComposerError(None, None, f"the key '{key.value}' occurs twice", key.start_mark)
                seen.add(key.value)
        return node


def _yaml(text: str) -> Any:
    """Parse YAML; every problem of the text is a YAMLError."""
    try:
        return yaml.load(text, _Loader)
    except RecursionError as error:
        raise yaml.YAMLError("nested too deep") from error


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
    as_it_is = takes_text([*sections, last], Config) and not text.lstrip().startswith(("'", '"', "!"))
    try:
        value = _yaml(text)
    except yaml.YAMLError as error:
        if not as_it_is:
            raise ConfigError(f"--set {override}: the value is not YAML") from error
        if not text.isascii() and text.encode(errors="replace").decode() != text:
            raise ConfigError(f"--set {key.strip()}: the value is not UTF-8") from error
        value = text
    # For a text YAML's rules lose parts (what follows " #", line breaks) or make another value of it (1, on, {input}).
    values[last] = text if as_it_is and value is not None else value


def _resolve_paths(raw: dict[str, Any], folder: Path) -> None:
    tasks = raw.get("tasks")
    specs = [raw, *(tasks.values() if isinstance(tasks, dict) else ())]
    found = [spec["data"] for spec in specs if isinstance(spec, dict) and isinstance(spec.get("data"), dict)]
    sections = [(data, key) for data in found for key in ("path", "train_without")]
    for section, key in [*sections, (raw, "backbone")]:
        value = section.get(key)
        if isinstance(value, str) and value.strip() and not os.path.exists(value) and os.path.exists(folder / value):
            section[key] = str((folder / value).resolve())


def _merge(under: dict[str, Any], over: dict[str, Any]) -> dict[str, Any]:
    merged = dict(under)
    for key, value in over.items():
        below = merged.get(key)
        merged[key] = _merge(below, value) if isinstance(below, dict) and isinstance(value, dict) else value
    return merged
