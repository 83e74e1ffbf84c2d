"""The replica against a step-by-step simulation, and its queue against the formulas of queueing theory."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from proper.simulation.activity import Arrival
from proper.simulation.costs import ServingCosts
from proper.simulation.replica import NO_ADAPTER
from proper.simulation.schema import ClusterConfig
from proper.simulation.serving import serve_requests
from tests.simulation.engine_steps import by_single_steps

# Powers of two, so that sums of times are exact in any order and ties do not depend on rounding.
COSTS = ServingCosts(steps=(1 / 64, 1 / 32, 3 / 64, 1 / 16), prefill=1 / 32, prefill_token=1 / 1024, load=3 / 128)

# Arrivals never coincide with the end of a step: all costs are multiples of 1 / 1024, the arrivals are odd 4096ths.
TIMES = st.lists(st.integers(1, 4000).map(lambda at: (2 * at + 1) / 4096), min_size=1, max_size=30).map(sorted)


@given(times=TIMES, draw=st.data(), rows=st.integers(1, 4), spare=st.integers(0, 2), patience=st.integers(0, 3))
@settings(max_examples=80, deadline=None)
def test_a_replica_does_what_single_steps_do(
    times: list[float], draw: st.DataObject, rows: int, spare: int, patience: int
) -> None:
    small = st.tuples(st.integers(1, 8), st.integers(1, 24), st.integers(1, 12))
    requests = [Arrival(time, *draw.draw(small)) for time in times]
    cluster = ClusterConfig(rows=rows, slots=rows + spare, patience=patience, prefill_tokens=48)
    wanted = by_single_steps(requests, cluster, COSTS)
    day = serve_requests(requests, cluster, COSTS, lambda user: user, replicas=1)
    found = sorted(day.jobs, key=lambda job: job.arrival)
    order = sorted(range(len(requests)), key=lambda at: requests[at].time)
    pairs = [(job.hit, job.first, job.ended) for job in found]
    if len({*times}) == len(times):  # requests of the same instant keep no order in the comparison
        assert pairs == [wanted[at] for at in order]
    assert sorted(pairs) == sorted(wanted)


def queue_waits(load: float, variation: float, count: int = 30_000) -> float:
    """Return the mean wait of a queue with one row, where serving takes a second on average and never a load."""
    random = np.random.default_rng(7)
    times = np.cumsum(random.exponential(1 / load, count)).tolist()
    requests = [Arrival(time, at, 1, 1) for at, time in enumerate(times)]
    costs = ServingCosts(steps=(1.0,), prefill=1.0, prefill_token=0.0, load=0.0, variation=variation)
    cluster = ClusterConfig(rows=1, slots=1)
    day = serve_requests(requests, cluster, costs, lambda _: NO_ADAPTER, replicas=1, seed=3)
    assert len(day.jobs) == count
    assert day.busy == pytest.approx(load, rel=0.02)
    return float(np.mean([job.started - job.arrival for job in day.jobs]))


def test_the_queue_agrees_with_md1_and_mm1() -> None:
    load = 0.5
    assert queue_waits(load, 0.0) == pytest.approx(load / (2 * (1 - load)), rel=0.06)
    assert queue_waits(load, 1.0) == pytest.approx(load / (1 - load), rel=0.06)


def test_an_arrival_in_a_long_run_of_steps_waits_for_the_current_step_only() -> None:
    requests = [Arrival(0.0, 1, 16, 1000), Arrival(5.001, 2, 16, 1)]
    day = serve_requests(requests, ClusterConfig(rows=2, slots=2), COSTS, lambda _: NO_ADAPTER, replicas=1)
    second = next(job for job in day.jobs if job.answer == 1)
    assert second.started - second.arrival <= COSTS.steps[0]


def test_an_adapter_that_is_not_local_is_fetched_once() -> None:
    costs = ServingCosts(steps=(0.1,), prefill=0.1, prefill_token=0.0, load=0.01, remote=0.5)
    cluster = ClusterConfig(rows=1, slots=1, local_adapters=2)
    requests = [Arrival(10.0 * at, user, 1, 1) for at, user in enumerate([1, 2, 1, 3, 2])]
    day = serve_requests(requests, cluster, costs, lambda user: user, replicas=1)
    loads = [round(job.started - job.arrival, 6) for job in day.jobs]
    assert loads == [0.51, 0.51, 0.01, 0.51, 0.51], "user 2 left the local disk for user 3"
    assert day.fetched == 4
