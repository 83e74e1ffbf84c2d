"""A whole simulation: settings from a YAML file, serving with and without affinity, refits, storage, price."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from proper.config.errors import explain
from proper.config.loading import read_yaml
from proper.console import progress
from proper.errors import ConfigError, ProperError
from proper.simulation.costs import MeasuredCosts, ServingCosts, measured_costs
from proper.simulation.figures import serving_figures
from proper.simulation.fitting import simulate_refits
from proper.simulation.schema import SimulationConfig
from proper.simulation.serving import ClusterSlice, simulate_slice
from proper.simulation.sizing import CLOSE, needed_replicas, needed_workers, storage_and_price

MAX_TRIALS = 30
"""The search for the number of replicas gives up after so many simulated days."""


def load_simulation(path: Path) -> tuple[SimulationConfig, MeasuredCosts]:
    """Read the settings and costs of a simulation.

    Raises:
        ConfigError: the file is not YAML, a key is unknown or missing, a value impossible; the message names the key.
    """
    try:
        config = SimulationConfig.model_validate(read_yaml(path))
    except ValidationError as error:
        raise ConfigError(f"{path}: {explain(error, SimulationConfig)}") from error
    try:
        return config, measured_costs(config, path.parent)
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from error


def simulate(config: SimulationConfig, costs: MeasuredCosts) -> dict[str, Any]:
    """Run a simulation; equal settings and costs give equal figures.

    Returns:
        {"schema", "setting", "costs", "replicas", "with_affinity", "without_affinity", "refits", "size"}.

    Raises:
        ProperError: `auto` finds no number of replicas or workers that meets the targets.
    """
    replicas, workers = config.cluster.replicas, config.refits.workers
    if isinstance(replicas, int):
        near = _serve(config, costs.serving, replicas, affinity=True)
    else:
        replicas, near = _enough_replicas(config, costs.serving)
    if not isinstance(workers, int):
        with progress("finding the number of fit workers", None):
            workers = needed_workers(config, costs.fit_seconds)
    far = _serve(config, costs.serving, replicas, affinity=False)
    with progress("refits", None) as advance:
        refits = simulate_refits(config, costs.fit_seconds, workers, advance)
    return {
        "schema": 1,
        "setting": config.model_dump(mode="json"),
        "costs": _plain(costs),
        "replicas": replicas,
        "with_affinity": near,
        "without_affinity": far,
        "refits": refits,
        "size": storage_and_price(config, costs, replicas, workers),
    }


def in_words(result: dict[str, Any]) -> list[str]:
    """Return a simulation's result as a short table of lines."""
    config, size, refits = result["setting"], result["size"], result["refits"]
    lines = [
        f"{config['users']:,} users, {config['activity']['requests_per_user_day']:g} requests each a day: "
        f"{result['replicas']:,} replicas of {config['cluster']['rows']} rows and {config['cluster']['slots']} slots",
        f"{'':22}{'with affinity':>16}{'without':>16}",
    ]
    rows: dict[str, Callable[[dict[str, Any]], str]] = {
        "adapter in a slot": lambda side: f"{side['hit_rate']:.1%}",
        "fetched from elsewhere": lambda side: f"{side['fetched']:.1%}",
        "first token, p50": lambda side: f"{side['first_token_seconds']['p50']:.3g} s",
        "first token, p95": lambda side: f"{side['first_token_seconds']['p95']:.3g} s",
        "first token, p99": lambda side: f"{side['first_token_seconds']['p99']:.3g} s",
        "at the peak, p95": lambda side: f"{side['peak_first_token_p95']:.3g} s",
        "wait for a row, p95": lambda side: f"{side['queue_seconds']['p95']:.3g} s",
        "sent elsewhere": lambda side: f"{side['spilled']:.1%}",
        "rows in use": lambda side: f"{side['rows_used']:.1%}",
    }
    for name, shown in rows.items():
        lines.append(f"{name:22}{shown(result['with_affinity']):>16}{shown(result['without_affinity']):>16}")
    lines += [
        f"refits: {refits['due']:,} a day by {refits['workers']:,} workers, {refits['busy']:.0%} busy; "
        f"{refits['missed']:.1%} miss {config['refits']['deadline_hours']:g} hours",
        f"stored: {size['storage_bytes'] / 1e9:,.1f} GB",
        f"machines: {size['machines']:,}, {size['machines_per_million_users']:,.2f} per million users; "
        f"price of a month per million users: {size['price_month_per_million_users']:,.2f}",
    ]
    return lines


def _enough_replicas(config: SimulationConfig, costs: ServingCosts) -> tuple[int, dict[str, Any]]:
    """Return the number of replicas that meets the target on the simulated day, too, and that day's figures.

    The search takes the first of several noisy figures that meets the target; near saturation another draw of requests
    may miss it, so the whole day has the last word.
    """
    with progress("finding the number of replicas", None):
        replicas = needed_replicas(config, costs)
    for _ in range(MAX_TRIALS):
        figures = _serve(config, costs, replicas, affinity=True)
        if figures["peak_first_token_p95"] <= config.targets.first_token_p95:
            return replicas, figures
        replicas = max(replicas + 1, math.ceil(CLOSE * replicas))
    raise ProperError(f"'cluster.replicas': {replicas} do not meet the targets on the simulated day; relax 'targets'")


def _serve(config: SimulationConfig, costs: ServingCosts, replicas: int, *, affinity: bool) -> dict[str, Any]:
    part = ClusterSlice.of(config, replicas, affinity=affinity)
    total = round(part.cycle.rate * part.cycle.length)
    with progress(f"serving {'with' if affinity else 'without'} affinity", total) as advance:
        day = simulate_slice(config, costs, part, affinity=affinity, advance=advance)
    return serving_figures(day, costs.request, part.cycle) | {"simulated_replicas": part.replicas}


def _plain(costs: MeasuredCosts) -> dict[str, Any]:
    serving = costs.serving
    return {
        "step_seconds": {str(at + 1): seconds for at, seconds in enumerate(serving.steps)},
        "prefill_seconds": serving.prefill,
        "prefill_token_seconds": serving.prefill_token,
        "load_seconds": serving.load,
        "remote_seconds": serving.remote,
        "request_seconds": serving.request,
        "variation": serving.variation,
        "fit_seconds": costs.fit_seconds,
        "adapter_bytes": costs.adapter_bytes,
    }
