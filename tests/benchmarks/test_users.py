"""The sides of the benchmark do the same work, and its figures are what they say. Nothing here looks at a time."""

from __future__ import annotations

import pytest
import torch

from proper.benchmarks import users as benchmark
from proper.benchmarks.groups import LoopedExperts
from proper.benchmarks.training_setup import train_one_by_one
from proper.config import GroupsConfig, UsersConfig
from proper.layers.experts import Experts

SIZE = benchmark.UsersBenchSize(users=6, items=5, alone=2, repeats=1)


@pytest.fixture(scope="module")
def bench() -> benchmark._Bench:
    return benchmark._Bench(SIZE, UsersConfig(batch_size=4, epochs=2), None, torch.device("cpu"))


def test_the_ceiling_sees_every_item_as_often_as_the_engine(bench: benchmark._Bench) -> None:
    seen = [row.ids for step in bench.stream for piece in step for _, _, row in piece]
    there = [row.ids for job in bench.jobs for row in job.items]
    assert sorted(seen) == sorted(there * 2)
    assert len(bench.stream) == 2 * 2, "two steps a pass, everybody at once"
    assert bench.tokens == 2 * sum(map(len, there))
    assert 0 <= bench.padding < 0.3


def test_the_ceiling_learns(bench: benchmark._Bench) -> None:
    before = [parameter.clone() for parameter in bench.parameters]
    bench.shared()
    assert all(not torch.equal(now, then) for now, then in zip(bench.parameters, before, strict=True))
    assert sum(p.numel() for p in bench.parameters) == bench.model.layout(4).width, "of a user's shape"


def test_oppus_way_trains_the_same_shape_and_leaves_the_model_as_it_was(bench: benchmark._Bench) -> None:
    names = [name for name, _ in bench.bare.model.named_parameters()]
    found = train_one_by_one(bench.bare.model, bench.alone, bench.config, 1e-3, bench.pad)
    assert len(found) == 2
    for adapter in found:
        assert sum(tensor.numel() for tensor in adapter.values()) == bench.model.layout(4).width
        assert all(tensor.any() for name, tensor in adapter.items() if "lora_B" in name), "B has left zero"
    assert [name for name, _ in bench.bare.model.named_parameters()] == names


def test_figures_and_setting() -> None:
    found = benchmark.run(benchmark.UsersBenchSize(users=4, items=2, alone=1, repeats=1), "cpu")
    sides = ("oppu", "one_slot", "ceiling")
    ratios = {f"mixed_over_{side}{form}" for side in sides for form in ("", "_experts")}
    assert set(found["figures"]) == ratios | {"padding", "peak_memory_bytes"}
    hourly = found["users_per_hour"]
    assert found["figures"]["mixed_over_oppu"] == pytest.approx(hourly["mixed"] / hourly["oppu"], rel=0.01)
    assert found["figures"]["peak_memory_bytes"] > 2**27
    assert found["setting"]["users"] == 4 and found["setting"]["compile"] is False
    assert found["floor"]["operations_per_user"] > 1e9


def test_looped_experts_are_the_fused_ones() -> None:
    config, generator = GroupsConfig(), torch.Generator().manual_seed(0)
    fused = Experts(6, 5, experts=config.experts, rank=3, alpha=4.0)
    looped = LoopedExperts(fused)
    fused.up.data.normal_(generator=generator)
    x = torch.randn(2, 3, 6, generator=generator)
    gates = torch.randn(2, 3, config.experts, generator=generator).softmax(-1)
    onto = torch.randn(2, 3, 5, generator=generator)
    assert torch.allclose(fused(x, gates), looped(x, gates), atol=1e-5)
    assert torch.allclose(fused(x, gates, onto=onto), looped(x, gates, onto=onto), atol=1e-5)
