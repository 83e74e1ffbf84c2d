"""Measured costs of serving and fitting, from the settings and from files of `proper bench`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from pydantic import ValidationError

from proper.config.errors import explain
from proper.errors import ConfigError, ProperError
from proper.files import read_json
from proper.simulation.schema import CostConfig, SimulationConfig


@dataclass(frozen=True)
class ServingCosts:
    """Seconds of everything that a replica does.

    Attributes:
        steps: seconds of one decoding step; entry b - 1 is for b rows.
        prefill: seconds of a prefill whatever its length.
        prefill_token: further seconds per prompt token, padding included.
        load: a cold load, from the local disk into a slot.
        remote: further seconds where the adapter is not on the local disk.
        request: seconds that every request takes outside the engine.
        variation: coefficient of variation of the time of one forward pass.
    """

    steps: tuple[float, ...]
    prefill: float
    prefill_token: float
    load: float
    remote: float = 0.0
    request: float = 0.0
    variation: float = 0.0


@dataclass(frozen=True)
class MeasuredCosts:
    """All costs of a simulation: serving, seconds of a worker per refitted user, bytes of an adapter on disk."""

    serving: ServingCosts
    fit_seconds: float
    adapter_bytes: float


def measured_costs(config: SimulationConfig, folder: Path) -> MeasuredCosts:
    """Return the costs of a simulation: values of the settings first, then those of the bench files.

    Args:
        config: the settings.
        folder: where relative paths of bench files start; tried after the current folder.

    Raises:
        ConfigError: a cost is neither given nor in a file; the message names its key.
        ProperError: a file cannot be read.
    """
    costs = config.costs
    serve, users, store = (_read(getattr(costs, name), name, folder) for name in ("serve", "users", "store"))
    found = _of_serve(costs, serve)
    load = _first(costs.load_seconds, found.load_seconds, _figure(store, "load_p50_ms", 1e-3))
    steps = costs.step_seconds or found.step_seconds
    if steps is None:
        raise _missing("step_seconds", "serve")
    serving = ServingCosts(
        step_table(steps, config.cluster.rows),
        _need("prefill_seconds", "serve", _first(costs.prefill_seconds, found.prefill_seconds)),
        _need("prefill_token_seconds", "serve", _first(costs.prefill_token_seconds, found.prefill_token_seconds)),
        _need("load_seconds", "serve", load),
        costs.remote_seconds,
        costs.request_seconds,
        _first(costs.variation, found.variation) or 0.0,
    )
    hourly = _first(users.get("users_per_hour", {}).get("mixed_experts"), users.get("users_per_hour", {}).get("mixed"))
    fit = _need("fit_seconds", "users", _first(costs.fit_seconds, 3600 / hourly if hourly else None))
    size, over = _figure(store, "load_bytes", 1.0), _figure(store, "bytes_over_raw", 1.0)
    stored = _first(config.storage.adapter_bytes, size * (over or 1.0) if size is not None else None)
    if stored is None:
        raise ConfigError(
            "'storage.adapter_bytes' is missing: give it, or 'costs.store', a file of 'proper bench store'"
        )
    return MeasuredCosts(serving, fit, stored)


def step_table(steps: Mapping[int, float], rows: int) -> tuple[float, ...]:
    """Return the seconds of a decoding step for 1 to `rows` rows.

    Linear between measured sizes; below the smallest it is the smallest's, above the largest the last slope goes on.
    """
    sizes = sorted(steps)
    seconds = [steps[size] for size in sizes]
    wanted = np.arange(1, rows + 1)
    found = np.interp(wanted, sizes, seconds)
    if len(sizes) > 1:
        slope = (seconds[-1] - seconds[-2]) / (sizes[-1] - sizes[-2])
        found = np.where(wanted > sizes[-1], seconds[-1] + max(0.0, slope) * (wanted - sizes[-1]), found)
    return tuple(found.tolist())


def _of_serve(costs: CostConfig, serve: dict[str, Any]) -> CostConfig:
    if not serve:
        return CostConfig()
    if "costs" not in serve:
        raise ConfigError(f"{costs.serve}: has no key 'costs'; measure again with 'proper bench serve --json FILE'")
    try:
        return CostConfig.model_validate(serve["costs"])
    except ValidationError as error:
        raise ConfigError(f"{costs.serve}: costs: {explain(error, CostConfig)}") from error


_READ = {"figures": ("load_p50_ms", "load_bytes", "bytes_over_raw"), "users_per_hour": ("mixed_experts", "mixed")}
"""What is read of the files of benchmarks, by the object that holds it."""


def _read(name: str | None, key: str, folder: Path) -> dict[str, Any]:
    if name is None:
        return {}
    path = Path(name) if Path(name).exists() else folder / name
    try:
        found = read_json(path)
    except (ProperError, OSError) as error:
        raise ConfigError(f"'costs.{key}': {error}") from error
    if not isinstance(found, dict):
        raise ConfigError(f"'costs.{key}': {path}: is not a file of 'proper bench {key}'")
    read: dict[str, Any] = found
    for part, names in _READ.items():
        values = read.get(part, {})
        wrong = [name for name in names if isinstance(values, dict) and not _is_number(values.get(name))]
        if wrong or not isinstance(values, dict):
            raise ConfigError(
                f"'costs.{key}': {path}: {'.'.join([part, *wrong[:1]])}: has a wrong value; measure again"
            )
    return read


def _is_number(value: Any) -> bool:
    """Whether a figure can be used: a number above zero, or None if it was not measured."""
    return value is None or (isinstance(value, int | float) and value is not True and value > 0)


def _figure(bench: dict[str, Any], name: str, unit: float) -> float | None:
    value = bench.get("figures", {}).get(name)
    return None if value is None else float(value) * unit


def _first(*values: float | None) -> float | None:
    return next((value for value in values if value is not None), None)


def _need(key: str, bench: str, value: float | None) -> float:
    if value is None:
        raise _missing(key, bench)
    return value


def _missing(key: str, bench: str) -> ConfigError:
    return ConfigError(f"'costs.{key}' is missing: give it, or 'costs.{bench}', a file of 'proper bench {bench}'")
