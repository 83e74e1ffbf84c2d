"""The sides of the benchmark do the same work, and its figures are what they say. Nothing here looks at a time."""

from __future__ import annotations

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from proper.benchmarks import users as benchmark
from proper.benchmarks.backbones import SHAPES, BenchBackbone
from proper.benchmarks.groups import LoopedExperts
from proper.benchmarks.training_setup import train_one_by_one
from proper.benchmarks.users_setup import UsersBench, UsersBenchSize
from proper.config import GroupsConfig, UsersConfig
from proper.layers.experts import Experts

SIZE = UsersBenchSize(users=6, items=5, alone=2, repeats=1)


@pytest.fixture(scope="module")
def bench() -> UsersBench:
    return UsersBench(SIZE, UsersConfig(batch_size=4, epochs=2), torch.device("cpu"), experts=False)


def test_the_ceiling_sees_every_item_as_often_as_the_engine(bench: UsersBench) -> None:
    seen = [row.ids for step in bench.stream for piece in step for _, _, row in piece]
    there = [row.ids for job in bench.jobs for row in job.items]
    assert sorted(seen) == sorted(there * 2)
    assert len(bench.stream) == 2 * 2, "two steps a pass, everybody at once"
    assert bench.tokens == 2 * sum(map(len, there))
    assert 0 <= bench.padding < 0.3


def test_the_ceiling_learns(bench: UsersBench) -> None:
    before = [parameter.clone() for parameter in bench.parameters]
    bench.shared()
    assert all(not torch.equal(now, then) for now, then in zip(bench.parameters, before, strict=True))
    assert sum(p.numel() for p in bench.parameters) == bench.model.layout(4).width, "of a user's shape"


def test_oppus_way_trains_the_same_shape_and_leaves_the_model_as_it_was(bench: UsersBench) -> None:
    names = [name for name, _ in bench.bare.model.named_parameters()]
    found = train_one_by_one(bench.bare.model, bench.alone, bench.config, 1e-3, bench.pad)
    assert len(found) == 2
    for adapter in found:
        assert sum(tensor.numel() for tensor in adapter.values()) == bench.model.layout(4).width
        assert all(tensor.any() for name, tensor in adapter.items() if "lora_B" in name), "B has left zero"
    assert [name for name, _ in bench.bare.model.named_parameters()] == names


def test_figures_and_setting() -> None:
    found = benchmark.run(UsersBenchSize(users=4, items=2, alone=1, repeats=1), "cpu")
    sides = ("oppu", "one_slot", "ceiling")
    ratios = {f"mixed_over_{side}{form}" for side in sides for form in ("", "_experts")}
    assert set(found["figures"]) == ratios | {"padding", "peak_memory_bytes"}
    hourly = found["users_per_hour"]
    assert found["figures"]["mixed_over_oppu"] == pytest.approx(hourly["mixed"] / hourly["oppu"], rel=0.01)
    assert found["figures"]["peak_memory_bytes"] > 2**27
    assert found["setting"]["users"] == 4 and found["setting"]["compile"] is False
    assert found["floor"]["operations_per_user"] > 1e9


TINY = BenchBackbone(
    "tiny",
    {
        **{"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 4, "num_attention_heads": 2},
        "num_key_value_heads": 2,
        "vocab_size": 8192,
    },
)


def test_fewer_layers_are_measured_beside_the_ceiling_in_all_of_them() -> None:
    size = UsersBenchSize(users=4, items=2, alone=1, repeats=1, backbone=TINY, layers=(2, "all", 1))
    found = benchmark.run(size, "cpu")
    sides = ("mixed_all", "mixed_1", "mixed_1_warm", "mixed_warm")
    for form in ("", "_experts"):
        hourly = {name: found["users_per_hour"][f"{name}{form}"] for name in (*sides, "mixed", "ceiling")}
        for name in sides:
            expected = pytest.approx(hourly[name] / hourly["ceiling"], rel=0.01)
            assert found["figures"][f"{name}_over_ceiling{form}"] == expected
    assert found["setting"]["layers"] == [2, "all", 1] and found["setting"]["backbone"] == "tiny"


def test_a_warm_side_runs_the_lower_layers_once_and_a_cold_one_each_time() -> None:
    size = UsersBenchSize(users=2, items=3, alone=1, repeats=1, backbone=TINY, layers=(2,))
    bench = UsersBench(size, UsersConfig(batch_size=4, epochs=2), torch.device("cpu"), experts=True)
    rows: list[int] = []
    layer = bench.model.backbone.model.get_submodule("model.layers.0.input_layernorm")
    layer.register_forward_pre_hook(lambda _, inputs: rows.append(len(inputs[0])))
    probe = 4  # two rows to learn whether layers can be skipped, with and without
    texts = len({row.ids for job in bench.jobs for row in job.items})
    for _ in range(2):
        bench.fit(bench.jobs, 2)
        assert sum(rows) == texts + probe
        rows.clear()
    for expected in (texts + probe, 0):
        bench.fit_warm(2)
        assert sum(rows) == expected
        rows.clear()
    bench.fit(bench.jobs, 2)
    bench.fit_warm(2)
    assert sum(rows) == texts + 2 * probe, "a cold side leaves the warm one's cache as it was"
    bench.close()


def test_smollm2s_shape_is_smollm2s() -> None:
    with torch.device("meta"):
        model = LlamaForCausalLM(LlamaConfig(**SHAPES["smollm2-135m"]))
    assert model.num_parameters() == 134_515_008


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
