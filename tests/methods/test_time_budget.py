"""Workload, estimate and time budget: counts against a trained run, times within a factor, settings that fit a time."""

from __future__ import annotations

import json
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from proper import pipeline
from proper.config import Config, make_config
from proper.console import spoken_time
from proper.data.dataset import Dataset
from proper.data.demo import DemoSettings, demo_config, write_demo
from proper.errors import ConfigError, RunFolderError
from proper.methods.speed import Speed, measure
from proper.methods.table import table_methods
from proper.methods.time_budget import (
    ENOUGH_ITEMS,
    ENOUGH_QUERIES,
    ENOUGH_TOKENS,
    MIN_ITEMS,
    MIN_QUERIES,
    MIN_STEPS,
    MIN_TOKENS,
    estimate,
    fit,
)
from proper.methods.workload import Counts, Work, count, cut_to, workload
from proper.run_config import claim, run_config
from proper.run_folder import RunFolder

DEMO = DemoSettings(users=24, items=(10, 14))
EVEN = Speed(population=1e-3, groups=1e-3, forward=3e-4, decode=1e-2)


def config_of(folder: Path, **changes: Any) -> Config:
    path = folder / "people" / "interactions.jsonl"
    if not path.exists():
        write_demo(path.parent, DEMO)
    raw = demo_config(path, DEMO)
    raw["split"] |= {"target_users": 5, "min_history": 5}
    raw |= {
        "population": {"epochs": 2, "max_tokens": 2600, "patience": 0, "sampling": "rows"},
        "groups": {"epochs": 1, "max_tokens": 2000},
        "users": {"epochs": 2, "tiers": {"select": False}},
        "evaluation": {"methods": ["population", "users"], "resamples": 200},
    }
    for key, value in changes.items():
        raw[key] = {**raw.get(key, {}), **value}
    return make_config(raw)


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, float]:
    """A small run with all stages, and its seconds."""
    folder = tmp_path_factory.mktemp("timed")
    started = time.perf_counter()
    return pipeline.run(config_of(folder), folder / "run", stages=["population", "groups", "users"]), (
        time.perf_counter() - started
    )


@pytest.fixture
def dataset(trained: tuple[Path, float]) -> Iterator[Dataset]:
    with Dataset.open(RunFolder(trained[0]).data) as opened:
        yield opened


def test_the_counts_are_those_of_the_trained_run(trained: tuple[Path, float], dataset: Dataset) -> None:
    config = run_config(trained[0])
    work = workload(config, count(config, dataset), [])
    steps: Counter[str] = Counter()
    tokens: Counter[str] = Counter()
    for line in RunFolder(trained[0]).metrics_log.read_text().splitlines():
        row = json.loads(line)
        steps[row["stage"]] += 1
        tokens[row["stage"]] += row["tokens"]
    for stage in ("population", "groups"):
        assert (work[stage].steps, work[stage].tokens) == (steps[stage], tokens[stage])
    drawn, spread = (dataset.sample("all", 2600, config.evaluation.seeds[0], by).tokens for by in ("rows", "users"))
    assert tokens["population"] == 2 * drawn != 2 * spread
    assert work["users"].tokens == tokens["users"], "every user trains all passes"


def test_the_estimate_is_right_within_a_factor(trained: tuple[Path, float], dataset: Dataset) -> None:
    folder, seconds = trained
    config = run_config(folder)
    found = estimate(config, count(config, dataset), [], measure(config, dataset))
    spent = sum(
        json.loads(RunFolder(folder).marker(s).read_text())["seconds"] for s in ("population", "groups", "users")
    )
    training = found.total - found.seconds["evaluate"]
    # Loose: other processes run on this machine, and not always the same ones during the run and the measurement.
    assert spent / 5 < training < 5 * seconds
    assert len(found.lines()) == 5 and found.lines()[0].startswith("time: population: ")


COUNTS = st.builds(
    lambda rows, more, users, items, queries: Counts(
        population=(rows, 40 * rows, 400),
        groups=(more, 40 * more, 0),
        histories=tuple((40,) * items for _ in range(users)),
        queries=(35,) * queries,
        answer=20,
    ),
    st.integers(10, 50_000),
    st.integers(10, 50_000),
    st.integers(1, 60),
    st.integers(2, 60),
    st.integers(1, 2_000),
)


def test_with_privacy_tokens_are_counted_and_steps_are_not() -> None:
    counts = Counts((100, 900, 0), (80, 700, 0), (), (), 1)
    config = make_config({"data": {"path": "x"}, "privacy": {"epsilon": 8}, "groups": {"epochs": 3}})
    work = workload(config, counts, [])
    assert (work["population"], work["groups"]) == (Work(tokens=2700), Work(tokens=2100))
    assert "steps" not in estimate(config, counts, [], EVEN).lines()[0]


@given(counts=COUNTS, minutes=st.integers(1, 300), steps=st.sampled_from([None, 40]))
@settings(max_examples=25, deadline=None)
def test_a_budget_is_kept_or_called_too_short(counts: Counts, minutes: int, steps: int | None) -> None:
    raw = {"data": {"path": "rows.jsonl"}, "compute": {"budget": f"{minutes}m"}, "users": {"steps": steps}}
    config = make_config(raw)
    methods = table_methods(["population", "users", "oppu"], config)
    whole = estimate(config, counts, methods, EVEN).total
    fitted = fit(config, counts, methods, EVEN)
    found = fitted.config
    total = estimate(found, cut_to(found, counts), methods, EVEN).total
    if whole <= 60 * minutes:
        assert found == config and fitted.lines == []
    elif total > 60 * minutes:
        assert "too short" in fitted.lines[-1] and spoken_time(total) in fitted.lines[-1]
        assert found.split.max_queries == (MIN_QUERIES if len(counts.queries) > MIN_QUERIES else None)
    else:
        assert fitted.lines and all("too short" not in line for line in fitted.lines)
    assert [line.split(": ")[1].split(" is ")[0] for line in fitted.lines if "too short" not in line] == [
        *found.compute.cut
    ]
    lowered = {
        "population.max_tokens": (found.population.max_tokens, MIN_TOKENS),
        "groups.max_tokens": (found.groups.max_tokens, MIN_TOKENS),
        "users.max_items": (found.users.max_items, MIN_ITEMS),
        "users.steps": (found.users.steps, MIN_STEPS),
        "split.max_queries": (found.split.max_queries, MIN_QUERIES),
    }
    for name in found.compute.cut:
        value, least = lowered[name]
        assert value is not None and value >= least
    queries, items = found.split.max_queries, found.users.max_items
    if queries is not None and queries < ENOUGH_QUERIES and counts.population[1] > MIN_TOKENS:
        assert found.population.max_tokens == MIN_TOKENS, "training goes before the last queries"
    for stage in (found.population, found.groups):
        if stage.max_tokens is not None and stage.max_tokens < ENOUGH_TOKENS:
            assert len(counts.histories[0]) <= ENOUGH_ITEMS or (items is not None and items <= ENOUGH_ITEMS)


def test_stage_1_is_not_starved_for_the_sake_of_long_histories() -> None:
    """HuffPost's sizes: stages 1 and 2 had 23,000 tokens of 760,000, and stage 3 most of the time, on all items."""
    counts = Counts((9_600, 730_000, 38_000), (9_600, 730_000, 0), ((75,) * 110,) * 100, (75,) * 2_000, 4)
    config = make_config({"data": {"path": "rows.jsonl"}, "compute": {"budget": "40m"}})
    methods, speed = table_methods(["population", "users"], config), Speed(5e-4, 7e-4, 2e-4, 1e-2)
    fitted = fit(config, counts, methods, speed).config
    seconds = estimate(fitted, cut_to(fitted, counts), methods, speed).seconds
    assert fitted.population.max_tokens is not None and fitted.population.max_tokens >= ENOUGH_TOKENS
    assert seconds["users"] < 3 * seconds["population"] and sum(seconds.values()) <= 2400


def test_a_resumed_run_keeps_what_the_budget_lowered(
    backbone_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = config_of(tmp_path, compute={"budget": "30s"}, population={"max_tokens": None}, users={"epochs": 2})
    config = config.model_copy(update={"backbone": str(backbone_folder)})
    slow = Speed(population=1e-2, groups=1e-2, forward=1e-3, decode=0.1)
    monkeypatch.setattr("proper.methods.time_budget.measure", lambda *_: slow)
    monkeypatch.setattr("proper.methods.time_budget.MIN_TOKENS", 1000)
    monkeypatch.setattr("proper.methods.time_budget.MIN_QUERIES", 3)
    run = pipeline.run(config, tmp_path / "run", stages=["population"])
    kept = run_config(run)
    assert kept.population.max_tokens is not None and kept.compute.cut["population.max_tokens"] is None
    assert kept.split.max_queries == 3
    with Dataset.open(RunFolder(run).data) as prepared:
        assert len(list(prepared.queries())) == 3, "the data were prepared again"
    fast = replace(slow, population=1e-9, groups=1e-9, forward=1e-9, decode=1e-9)
    monkeypatch.setattr("proper.methods.time_budget.measure", lambda *_: fast)
    assert claim(run, config) == kept
    pipeline.run(config, run, stages=["population"])
    assert run_config(run) == kept
    with pytest.raises(RunFolderError, match="population.epochs"):
        claim(run, config.model_copy(update={"population": config.population.model_copy(update={"epochs": 3.0})}))
    with pytest.raises(RunFolderError, match="compute.budget"):
        claim(run, config.model_copy(update={"compute": config.compute.model_copy(update={"budget": "31s"})}))


@pytest.mark.parametrize("wrong", ["soon", "40", "0m", "m", "-3m"])
def test_a_budget_that_is_no_time_is_refused(wrong: str) -> None:
    with pytest.raises(ConfigError, match=r"compute\.budget.*not a time"):
        make_config({"data": {"path": "x"}, "compute": {"budget": wrong}})


def test_times_are_spoken_in_a_unit_that_suits() -> None:
    assert [spoken_time(s) for s in (0.2, 89, 90, 5000, 6000)] == ["1 s", "89 s", "2 min", "83 min", "1.7 h"]
    assert Work(1, 2, 3, 4).times(2) + Work(1) == Work(3, 4, 6, 8)
