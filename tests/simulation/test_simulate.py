"""The whole simulation: agreement of a slice with the whole cluster, refits, sizes, and settings that are wrong."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml

from proper.cli.app import main
from proper.errors import ConfigError, ProperError
from proper.simulation.costs import step_table
from proper.simulation.figures import serving_figures
from proper.simulation.fitting import simulate_refits
from proper.simulation.schema import ActivityConfig, SimulationConfig
from proper.simulation.serving import ClusterSlice, UserKeys, simulate_slice
from proper.simulation.simulate import load_simulation, simulate
from proper.simulation.sizing import smallest

COSTS = {
    "step_seconds": {1: 0.02, 8: 0.03},
    "prefill_seconds": 0.02,
    "prefill_token_seconds": 0.0001,
    "load_seconds": 0.002,
    "fit_seconds": 2.0,
}
BASE: dict[str, Any] = {
    "users": 20_000,
    "activity": {"requests_per_user_day": 40, "answer_tokens": {"mean": 20}, "prompt_tokens": {"mean": 50}},
    "cluster": {"replicas": 8, "rows": 8, "slots": 64},
    "costs": COSTS,
    "storage": {"adapter_bytes": 1000},
    "refits": {"workers": 4},
    "sample": {"replicas": 2, "requests": 6000},
}


def settings(**changes: Any) -> dict[str, Any]:
    merged = {k: {**BASE[k], **v} if isinstance(v, dict) and k in BASE else v for k, v in changes.items()}
    return {**BASE, **merged}


def written(folder: Path, raw: dict[str, Any]) -> Path:
    path = folder / "simulation.yaml"
    path.write_text(yaml.safe_dump(raw))
    return path


def hit_rate(config: SimulationConfig, tmp_path: Path, *, affinity: bool) -> float:
    _, costs = load_simulation(written(tmp_path, config.model_dump()))
    part = ClusterSlice.of(config, 8, affinity=affinity)
    day = simulate_slice(config, costs.serving, part, affinity=affinity)
    return float(serving_figures(day, 0.0, part.cycle)["hit_rate"])


@pytest.mark.parametrize("affinity", [True, False])
def test_a_slice_has_the_hit_rate_of_the_whole_cluster(tmp_path: Path, affinity: bool) -> None:
    part = SimulationConfig.model_validate(settings())
    whole = SimulationConfig.model_validate(settings(sample={"replicas": 8, "requests": 12_000}))
    found = hit_rate(part, tmp_path, affinity=affinity)
    assert found == pytest.approx(hit_rate(whole, tmp_path, affinity=affinity), abs=0.03)
    assert (found > 0.12) == affinity, "a slot of eight replicas serves an eighth of the users with affinity only"


def test_the_command_writes_the_same_result_every_time(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path, out = written(tmp_path, settings()), tmp_path / "out.json"
    assert main(["simulate", str(path), "--json", str(out)]) == 0
    table = capsys.readouterr().out
    result = json.loads(out.read_text())
    assert main(["simulate", str(path)]) == 0
    assert json.loads(capsys.readouterr().out) == result
    assert "20,000 users, 40 requests each a day: 8 replicas of 8 rows and 64 slots" in table
    assert result["with_affinity"]["requests"] == pytest.approx(6000, rel=0.1)
    assert len(result["with_affinity"]["by_hour"]) == 24
    assert result["size"]["storage_bytes"] == 20_000 * (2 * 1000 + 4096)
    assert result["size"]["machines"] == 12


def test_auto_meets_the_targets(tmp_path: Path) -> None:
    raw = settings(cluster={"replicas": "auto"}, refits={"workers": "auto"}, targets={"first_token_p95": 0.25})
    result = simulate(*load_simulation(written(tmp_path, raw)))
    assert result["with_affinity"]["peak_first_token_p95"] <= 0.25
    assert result["refits"]["missed"] <= 0.01
    config, costs = load_simulation(written(tmp_path, settings(cluster={"replicas": max(1, result["replicas"] // 2)})))
    part = ClusterSlice.of(config, int(config.cluster.replicas), affinity=True)
    half = serving_figures(simulate_slice(config, costs.serving, part, affinity=True), 0.0, part.cycle)
    assert half["peak_first_token_p95"] > 0.25, "half as many do not meet it"


def test_a_target_that_no_number_meets_is_an_error(tmp_path: Path) -> None:
    raw = settings(cluster={"replicas": "auto"}, targets={"first_token_p95": 0.01})
    with pytest.raises(ProperError, match=r"'cluster\.replicas': .* do not meet the targets"):
        simulate(*load_simulation(written(tmp_path, raw)))


def test_refits_that_exceed_the_workers_miss_their_deadline() -> None:
    config = SimulationConfig.model_validate(settings(users=2_000_000, activity={"requests_per_user_day": 0.4}))
    # 80,000 refits a day of 2 s, hardly ever of the same user: 1.85 workers' load.
    assert simulate_refits(config, 2.0, 4)["missed"] == 0
    short = config.model_copy(update={"refits": config.refits.model_copy(update={"deadline_hours": 10.0})})
    behind = simulate_refits(short, 2.0, 1)
    assert behind["busy"] == pytest.approx(1.85, abs=0.01)
    assert behind["missed"] > 0.9, "after a day at 1.85 times the capacity, the queue is 20 hours long"
    often = config.model_copy(update={"users": 20_000, "activity": ActivityConfig(requests_per_user_day=40)})
    bounded = simulate_refits(often, 2.0, 1)
    assert bounded["busy"] == behind["busy"]
    assert bounded["hours"]["p99"] < 20_000 * 2.0 / 3600, "a waiting user is not queued twice"


def test_a_refit_makes_the_old_version_stale() -> None:
    keys = UserKeys(adapted=1.0, per_request=1.0, seed=0)
    assert len({keys.of(7) for _ in range(5)}) == 5
    kept = UserKeys(adapted=1.0, per_request=0.0, seed=0)
    assert {kept.of(7) for _ in range(5)} == {7}
    some = UserKeys(adapted=0.3, per_request=0.0, seed=0)
    assert sum(some.has_adapter(user) for user in range(10_000)) == pytest.approx(3000, abs=150)


def test_steps_between_and_beyond_the_measured_sizes() -> None:
    assert step_table({2: 1.0, 4: 2.0}, 6) == (1.0, 1.0, 1.5, 2.0, 2.5, 3.0)
    assert step_table({1: 1.0}, 3) == (1.0, 1.0, 1.0)


def test_the_search_finds_the_smallest_number_within_three_percent() -> None:
    for least, wanted in [(1, 1), (1, 2), (3, 50), (100, 777), (5000, 5001)]:
        found = smallest(least, lambda number, wanted=wanted: number >= wanted, "n")
        assert wanted <= found <= 1.03 * wanted + 1


@pytest.mark.parametrize(
    ("raw", "message"),
    [
        ({"users": 5, "cluster": {"replica": 3}}, "unknown key 'cluster.replica'; did you mean 'replicas'?"),
        ({"cluster": {}}, "'users' is missing"),
        ({"users": 5, "cluster": {"rows": 8, "slots": 4}}, "'cluster': slots (4) should be at least rows (8)"),
        ({"users": 5, "cluster": {"replicas": 0}}, "'cluster.replicas': should be at least 1, not 0"),
        ({"users": 5}, "'costs.step_seconds' is missing: give it, or 'costs.serve', a file of 'proper bench serve'"),
        ({"users": 5, "costs": {"serve": "none.json"}}, "'costs.serve': "),
    ],
)
def test_a_wrong_setting_is_one_line_that_names_it(
    raw: dict[str, Any], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = written(tmp_path, raw)
    assert main(["simulate", str(path)]) == 2
    error = capsys.readouterr().err
    assert f"{path}: {message}" in error and error.count("\n") == 1


@pytest.mark.parametrize(
    ("file", "content", "said"),
    [
        ("store", "[]", "is not a file of 'proper bench store'"),
        ("store", '{"figures": []}', "figures: has a wrong value; measure again"),
        ("store", '{"figures": {"load_bytes": "x"}}', "figures.load_bytes: has a wrong value"),
        ("store", '{"figures": {"load_p50_ms": NaN}}', "figures.load_p50_ms: has a wrong value"),
        ("users", '{"users_per_hour": 3}', "users_per_hour: has a wrong value"),
        ("users", '{"users_per_hour": {"mixed": 0}}', "users_per_hour.mixed: has a wrong value"),
        ("users", "[" * 100_000, "not readable as JSON"),
    ],
)
def test_a_damaged_file_of_a_benchmark_is_named(tmp_path: Path, file: str, content: str, said: str) -> None:
    (tmp_path / "bench.json").write_text(content)
    costs = {key: value for key, value in COSTS.items() if key != "fit_seconds"}
    with pytest.raises(ConfigError, match=rf"'costs\.{file}': .*bench\.json: {said}"):
        load_simulation(written(tmp_path, {"users": 100, "costs": {**costs, file: "bench.json"}}))


def test_costs_come_from_bench_files_and_values_win(tmp_path: Path) -> None:
    costs = {key: value for key, value in COSTS.items() if key != "fit_seconds"}
    (tmp_path / "serve.json").write_text(json.dumps({"figures": {}, "costs": costs}))
    (tmp_path / "users.json").write_text(json.dumps({"figures": {}, "users_per_hour": {"mixed_experts": 7200.0}}))
    (tmp_path / "store.json").write_text(json.dumps({"figures": {"load_bytes": 2e6, "bytes_over_raw": 1.5}}))
    files = {"serve": "serve.json", "users": "users.json", "store": "store.json"}
    raw = {"users": 100, "costs": {**files, "load_seconds": 0.5}}
    _, found = load_simulation(written(tmp_path, raw))
    assert (found.fit_seconds, found.adapter_bytes) == (0.5, 3e6)
    assert replace(found.serving, steps=()) == replace(found.serving, steps=(), load=0.5, prefill=0.02)
    assert found.serving.steps[0] == 0.02 and found.serving.load == 0.5
    (tmp_path / "serve.json").write_text(json.dumps({"figures": {}}))
    with pytest.raises(ConfigError, match="has no key 'costs'"):
        load_simulation(written(tmp_path, raw))
