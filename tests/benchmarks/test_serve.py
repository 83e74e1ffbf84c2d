"""The benchmark of serving runs on a small setting and gives what the documented figures are called."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from proper.benchmarks import serve
from proper.benchmarks.backbones import BenchBackbone
from proper.benchmarks.measure import interleaved
from proper.benchmarks.serve_loads import ClosedLoop, open_loop, quiet_key
from proper.benchmarks.serve_setup import Served

SIDES = {"base", "one", "mixed", "crowd", "plain", "peft", "generate", "loop"}
SMALL = replace(
    serve.QUICK,
    **{"hidden": 64, "inner": 96, "layers": 1, "users": 3, "prompt": 6, "answer": 4, "repeats": 1},  # type: ignore
    rows=2,
    slots=1,
    arrivals=6,
    asks=3,
    dtype=torch.float32,
)


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    backbone, cpu = SMALL.backbones["llama"], torch.device("cpu")
    made = Served(SMALL.shape(backbone), backbone.load(SMALL.dtype, cpu), cpu, tmp_path_factory.mktemp("serve"))
    yield made
    made.close()


def test_a_small_setting(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    result = serve.run(SMALL, "cpu")
    assert set(result["figures"]) >= {
        "mixed_over_base",
        "mixed_over_peft",
        "cliff_p95_first_token",
        "noisy_neighbour_wait_steps",
    }
    assert all(value > 0 for value in result["figures"].values())
    assert set(result["closed"]) == {"llama", "proper-nano"}
    for sides in result["closed"].values():
        assert set(sides) == SIDES
        assert all(_ordered(told) for told in sides.values())
    assert _ordered(result["open"]["resident"]) and _ordered(result["open"]["crowded"])
    assert result["setting"]["users"] == 3 and len([line for line in caplog.messages if not line.startswith(" ")]) == 4


def test_another_backbone_with_fewer_layers_is_measured_alone() -> None:
    shape = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 3, "num_attention_heads": 1}
    tiny = BenchBackbone("tiny", {**shape, "num_key_value_heads": 1, "vocab_size": 8192})
    result = serve.run(replace(SMALL, backbone=tiny, adapted=1), "cpu")
    assert set(result["closed"]) == {"tiny"} and "nano_mixed_over_base" not in result["figures"]
    assert result["figures"]["mixed_over_base"] > 0 and result["setting"]["layers"] == 1
    assert result["memory_bytes"]["adapter_of_one_user"] == 3 * 4 * (64 + 96) * 4, "one layer's, and PEFT's as many"
    assert result["memory_bytes"]["peft_adapters"] == 3 * result["memory_bytes"]["adapter_of_one_user"]


def _ordered(told: dict[str, Any]) -> bool:
    kinds = (told["first_token_seconds"], told["token_seconds"])
    return all(0 < kind["p50"] <= kind["p95"] <= kind["p99"] for kind in kinds)


def test_every_token_of_every_side_is_stamped(served: Served) -> None:
    loop = ClosedLoop(served, alone=2)
    interleaved(loop.sides(), 2)
    for name, times in loop.times.items():
        assert len(times) == 2 * (2 if name == "loop" else 3), "two repeats, the first one left out"
        assert {len(stamps) for stamps in times} == {4} and all(sorted(one) == one for one in times)


def test_a_crowd_finds_nothing_in_its_slots(served: Served) -> None:
    loop = ClosedLoop(served, alone=1)
    sides = loop.sides()
    for name, hits in (("mixed", 3), ("crowd", 0), ("one", 3)):
        side = sides[name]
        side.prepare(0)
        before = loop.counts().hits
        side.work(1)
        assert loop.counts().hits - before == hits
    assert len(open_loop(served, 2, 1, 1000.0, 5, seed=1)) == 5


def test_memory_is_what_lies_there(served: Served, tmp_path: Path) -> None:
    told = served.memory(3)
    assert told["slots"] == 3 * told["adapter_of_one_user"] == told["peft_adapters"]
    assert told["backbone"] == sum(tensor.numel() * 4 for tensor in served.bare.parameters())
    assert all(value > 0 for value in told.values())


def test_a_quiet_key_waits_at_most_two_steps_beside_a_flood(served: Served) -> None:
    asked = quiet_key(served, rows=8, asks=20, flooded=True, settled=True)
    assert sorted(asked.steps)[18] <= 2, asked.steps
    assert len(asked.seconds) == 20
    assert max(quiet_key(served, rows=8, asks=3, flooded=False).steps) == 1
