"""Search for the smallest number of replicas and fit workers that meet the targets; storage and price per month."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

from proper.errors import ProperError
from proper.simulation.activity import DAY
from proper.simulation.costs import MeasuredCosts, ServingCosts
from proper.simulation.figures import first_token, percentiles
from proper.simulation.fitting import daily_refits, simulate_refits
from proper.simulation.schema import SimulationConfig
from proper.simulation.serving import ClusterSlice, simulate_slice

CLOSE = 1.03
"""The search ends when the smallest number that meets the targets is known to within this factor."""
MAX_FACTOR = 32
"""The search gives up at this many times the number that the throughput alone asks for."""
MONTH_HOURS = 730.0


def smallest(least: int, enough: Callable[[int], bool], name: str) -> int:
    """Return the smallest number from `least` on that is enough, to within the factor `CLOSE`.

    Args:
        least: where the search starts.
        enough: whether a number is enough; true for all numbers above one for which it is true.
        name: key of the number, for the error.

    Raises:
        ProperError: `MAX_FACTOR` times `least` are not enough.
    """
    low, high = least - 1, least
    while not enough(high):
        low, high = high, max(high + 1, math.ceil(1.2 * high))
        if high > MAX_FACTOR * least:
            raise ProperError(f"'{name}': even {high} do not meet the targets; relax 'targets', or check the costs")
    while high - low > 1 and high > CLOSE * low:
        middle = (low + high) // 2
        low, high = (low, middle) if enough(middle) else (middle, high)
    return high


def needed_replicas(config: SimulationConfig, costs: ServingCosts) -> int:
    """Return the smallest number of replicas whose p95 of the first token meets the target at the peak, with affinity.

    Each number is tried with the constant load of the busiest hour and half of the sample's requests.

    Raises:
        ProperError: no number of replicas meets the target.
    """
    requests = max(1000, config.sample.requests // 2)

    def enough(replicas: int) -> bool:
        part = ClusterSlice.of(config, replicas, affinity=True).at_peak(requests)
        day = simulate_slice(config, costs, part, affinity=True)
        found = percentiles([first_token(job, costs.request) for job in day.jobs])
        return found["p95"] <= config.targets.first_token_p95

    return smallest(_least_replicas(config, costs), enough, "cluster.replicas")


def needed_workers(config: SimulationConfig, fit_seconds: float) -> int:
    """Return the smallest number of fit workers that meets `targets.missed_refits`.

    Raises:
        ProperError: no number of workers meets the target.
    """
    least = max(1, math.ceil(daily_refits(config) * fit_seconds / DAY))

    def enough(workers: int) -> bool:
        return bool(simulate_refits(config, fit_seconds, workers)["missed"] <= config.targets.missed_refits)

    return smallest(least, enough, "refits.workers")


def storage_and_price(config: SimulationConfig, costs: MeasuredCosts, replicas: int, workers: int) -> dict[str, Any]:
    """Return bytes stored, machines, and the price of a month: in all and per million users."""
    kept = config.storage
    adapters = config.users * config.activity.adapted * kept.versions * costs.adapter_bytes
    stored = adapters + config.users * kept.interaction_bytes
    prices = {
        "replicas": replicas * MONTH_HOURS * config.prices.replica_hour,
        "workers": workers * MONTH_HOURS * config.prices.worker_hour,
        "storage": stored / 1e9 * config.prices.storage_gb_month,
    }
    millions = config.users / 1e6
    return {
        "storage_bytes": round(stored),
        "machines": replicas + workers,
        "machines_per_million_users": round((replicas + workers) / millions, 3),
        "price_month": {name: round(price, 2) for name, price in prices.items()},
        "price_month_per_million_users": round(sum(prices.values()) / millions, 2),
    }


def _least_replicas(config: SimulationConfig, costs: ServingCosts) -> int:
    """Return the number of replicas whose throughput with full batches equals the load of the busiest hour."""
    activity, rows = config.activity, config.cluster.rows
    prompt, answer = activity.prompt_tokens.mean, activity.answer_tokens.mean
    seconds = costs.prefill / rows + costs.prefill_token * prompt + answer * costs.steps[rows - 1] / rows
    rate = config.users * activity.requests_per_user_day / DAY * (1 + activity.daily_swing)
    return max(1, math.ceil(rate * seconds))
