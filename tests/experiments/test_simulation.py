"""The comparison of simulation and server: its arithmetic, its committed result, and (slow) the comparison itself."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from experiments.simulation import costs_of, figures, run, simulated
from experiments.simulation_server import SLOTS, Work
from proper.simulation.activity import Arrival

RESULT = Path(__file__).parents[2] / "docs" / "results" / "bench" / "simulation-check.json"
WITHIN = 0.2
"""The bound of the comparison: hit rate and p95 of the simulation over those of the server differ from 1 by less."""


def test_costs_are_means_of_the_server_s_work() -> None:
    work = [Work("step", rows, 0.02 * rows * share) for rows in (1, 2, 3) for share in (0.9, 1.1)]
    work += [Work("prefill", 8, 0.05), Work("prefill", 108, 0.15), Work("load", 0, 0.004), Work("load", 0, 0.006)]
    costs = costs_of([*work, Work("rest", 0, 0.001)])
    assert costs.prefill_token == pytest.approx(0.001)
    assert costs.prefill == pytest.approx(0.042)
    assert costs.load == pytest.approx(0.005)
    assert costs.steps == pytest.approx((0.021, 0.041, 0.061))
    assert costs.variation == pytest.approx(0.1, rel=0.05)
    # A lonely request: the simulation gives back what was measured.
    warm, cold = ([Arrival(0.0, user, 8, 1)] for user in (1, SLOTS + 9))
    residents = list(range(1, SLOTS + 1))
    assert simulated(warm, costs, residents, 200)["first_token_seconds"]["p50"] == pytest.approx(0.05, rel=0.05)
    assert simulated(cold, costs, residents, 200)["first_token_seconds"]["p50"] == pytest.approx(0.055, rel=0.05)


def test_figures_are_the_median_ratios() -> None:
    def repeat(hit: float, seconds: float) -> dict[str, object]:
        times = {"p50": seconds, "p95": 2 * seconds, "p99": 3 * seconds}
        one = {"hit_rate": 0.5, "first_token_seconds": dict.fromkeys(times, 1.0), "answer_seconds": times}
        return {"server": one, "simulation": one | {"hit_rate": hit, "first_token_seconds": times}}

    found = figures([repeat(0.5, 0.9), repeat(0.4, 1.2), repeat(0.6, 1.1)])
    assert found == {
        "hit_rate_over_server": 1.0,
        "first_token_p50_over_server": 1.1,
        "first_token_p95_over_server": 2.2,
        "answer_p50_over_server": 1.0,
        "answer_p95_over_server": 1.0,
    }


def test_the_committed_comparison_is_within_the_bound() -> None:
    result = json.loads(RESULT.read_text(encoding="utf-8"))
    assert len(result["repeats"]) >= 3 and result["figures"] == figures(result["repeats"])
    for name in ("hit_rate_over_server", "first_token_p95_over_server", "answer_p95_over_server"):
        assert result["figures"][name] == pytest.approx(1, abs=WITHIN), name


@pytest.mark.slow
@pytest.mark.timeout(900)  # three repeats in real time take about seven minutes
def test_the_simulation_agrees_with_the_server(tmp_path: Path) -> None:
    run(3, 40, 0.3, tmp_path / "check.json")
    result = json.loads((tmp_path / "check.json").read_text())
    assert len(result["repeats"]) == 3
    assert result["figures"]["hit_rate_over_server"] == pytest.approx(1, abs=WITHIN)
    assert result["figures"]["first_token_p95_over_server"] == pytest.approx(1, abs=WITHIN)
