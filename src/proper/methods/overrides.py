"""Method overrides in brackets: `groups[groups.experts=8]`, `oppu[history=5]`, `users[rows=Category]`.

    section.key=VALUE   a setting of population, groups or users, in the syntax of --set
    history=N           target users have the newest N rows of their history, in every stage after population
    rows=TEXT           all stages train only on rows whose prompt asks for TEXT in its last line

Overrides can be chained: `users[history=5][users.rank=2]`. Stages that an override does not affect are taken from the
run, so a grid over one stage trains only that stage.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import yaml

from proper.config import Config, make_config
from proper.data.dataset import Dataset
from proper.data.derived.copies import keep_asking, shorten_histories
from proper.errors import ConfigError
from proper.methods.spec import Derive, DerivedRun, Method
from proper.methods.stage_methods import train_stages
from proper.run_folder import Stage

STAGES = tuple(Stage)

_NAME = re.compile(r"(?P<method>[^\[\]]+)(?P<changes>(\[[^\[\]=]+=[^\[\]]+\])+)")
_LONGEST = 200
"""Bytes of the longest name of a method: its files are called so."""

UNUSED = ("users.gradient_accumulation", "users.gradient_checkpointing")
"""Settings that all stages have and stage 3 does not use: a method would have another name and the same answers."""

_CHANGE = re.compile(r"\[([^\[\]=]+)=([^\[\]]+)\]")


@dataclass(frozen=True)
class Changes:
    """The overrides in a method's name.

    Attributes:
        settings: settings by section, with whole values.
        derive: function that derives the method's data; None for the same data.
        first: the earliest stage that the overrides change.
    """

    settings: Mapping[str, Mapping[str, Any]]
    derive: Derive | None
    first: Stage


def split_name(name: str) -> tuple[str, list[tuple[str, str]]]:
    """Return the method's name and its overrides, which are empty for a plain name.

    Raises:
        ConfigError: the brackets are not of the form `[key=value]`.
    """
    if "[" not in name:
        return name, []
    found = _NAME.fullmatch(name)
    if found is None:
        raise ConfigError(f"evaluation.methods: '{name}': write changes as groups[groups.experts=8]")
    return found["method"], _CHANGE.findall(found["changes"])


def change(method: Method, changes: list[tuple[str, str]], config: Config) -> Method:
    """Return the method with the overrides applied to a run of this config.

    Raises:
        ConfigError: a key is unknown, a value is impossible, or the overrides change nothing that the method trains.
    """
    name = method.name + "".join(f"[{key}={value}]" for key, value in changes)
    if len(name.encode()) > _LONGEST:
        raise ConfigError(f"evaluation.methods: '{name[:40]}...': a method's name has at most {_LONGEST} bytes")
    found = _read(name, changes, config, method.variant)
    own = method.variant or DerivedRun("", train_stages, inherits=method.stages)
    inherits = tuple(stage for stage in own.inherits if STAGES.index(stage) < STAGES.index(found.first))
    if found.derive is None and all(STAGES.index(stage) < STAGES.index(found.first) for stage in method.stages):
        raise ConfigError(f"evaluation.methods: '{name}': '{method.name}' trains nothing that this changes")
    # The stages share one folder, as do methods with the same variant, so groups and users train only once.
    stem = re.sub(r"[^\w.]+", "-", f"{own.name}{name.removeprefix(method.name)}").strip("-")
    variant = replace(
        own,
        name=stem,
        inherits=inherits,
        settings={**own.settings, **found.settings},
        derive=_after(found.derive, own.derive),
        # The folder's name does not tell rows=C from rows=C++.
        derived_by=own.derived_by + name.removeprefix(method.name),
    )
    return replace(method, name=name, variant=variant)


def _read(name: str, changes: list[tuple[str, str]], config: Config, variant: DerivedRun | None) -> Changes:
    raw = config.model_dump()
    for section, values in (variant.settings if variant else {}).items():
        raw[section] = {**raw[section], **values}
    derive: Derive | None = None
    touched: list[Stage] = []
    sections: list[str] = []
    first: Stage
    for key, value in changes:
        stage = next((stage for stage in STAGES if key.startswith(f"{stage}.")), None)
        if key == "history":
            derive, first = _after(derive, _shortened(name, value)), Stage.GROUPS
        elif key == "rows":
            derive, first = _after(derive, _asking(value)), Stage.POPULATION
        elif key in UNUSED:
            raise ConfigError(f"evaluation.methods: '{name}': stage 3 does not use '{key}'")
        elif stage is not None:
            _put(raw, key, value, name)
            sections.append(stage)
            first = stage
        else:
            raise ConfigError(f"evaluation.methods: '{name}': '{key}' is no setting of a stage, nor history or rows")
        touched.append(first)
    make_config(raw, f"method {name}")
    settings = {section: raw[section] for section in sections}
    return Changes(settings, derive, min(touched, key=STAGES.index))


def _put(raw: dict[str, Any], key: str, value: str, name: str) -> None:
    *sections, last = key.split(".")
    node: Any = raw
    for section in sections:
        node = node.get(section) if isinstance(node, dict) else None
    if not isinstance(node, dict):
        raise ConfigError(f"evaluation.methods: '{name}': there is no setting '{key}'")
    try:
        node[last] = yaml.safe_load(value)
    except yaml.YAMLError as error:
        raise ConfigError(f"evaluation.methods: '{name}': the value of '{key}' is not YAML") from error


def _shortened(name: str, value: str) -> Derive:
    if not re.fullmatch(r"[1-9]\d*", value):
        raise ConfigError(f"evaluation.methods: '{name}': history is a number of rows, at least 1")

    def derive(source: Dataset, path: Path, config: Config, seed: int) -> None:
        shorten_histories(source, path, int(value))

    return derive


def _asking(value: str) -> Derive:
    def derive(source: Dataset, path: Path, config: Config, seed: int) -> None:
        keep_asking(source, path, value)

    return derive


def _after(first: Derive | None, then: Derive | None) -> Derive | None:
    """Return the composition of two derivations."""
    if first is None or then is None:
        return first or then

    def derive(source: Dataset, path: Path, config: Config, seed: int) -> None:
        between = path.with_name(f"{path.name}.between")
        try:
            first(source, between, config, seed)
            with Dataset.open(between) as dataset:
                then(dataset, path, config, seed)
        finally:
            between.unlink(missing_ok=True)

    return derive
