"""The formula behind `slots: auto` against what torch allocates."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from torch.profiler import ProfilerActivity, profile

from proper.config import GroupsConfig, UsersConfig
from proper.data.encoder import EncodedExample
from proper.models.backbone import load_backbone
from proper.models.memory import device_memory
from proper.models.personal import ProperModel
from proper.training import memory
from proper.training.jobs import Job
from proper.training.memory import Footprint, auto_slots, footprint, pending_rows
from proper.training.multi_user_trainer import MultiUserTrainer

Build = Callable[..., ProperModel]


def storages(*tensors: torch.Tensor) -> int:
    """Bytes that tensors hold, shared storage once."""
    return sum({t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}.values())


@pytest.fixture(scope="module")
def nano() -> Iterator[ProperModel]:
    model = ProperModel(load_backbone("proper-nano", torch.bfloat16, torch.device("cpu")))
    model.add_experts(GroupsConfig(), seed=0)
    for parameter in model.group_parameters().values():
        parameter.requires_grad_(False)
    yield model


def test_a_slot_is_five_copies_in_fp32(grouped: Build) -> None:
    model, config = grouped(torch.bfloat16), UsersConfig(batch_size=4)
    for slots in (1, 7):
        engine = MultiUserTrainer(model, config, 0.0, 0, slots, pad=0)
        assert engine.bank.gradients is not None
        views = (*engine.bank.down.values(), *engine.bank.up.values())
        held = storages(
            engine.bank.values,
            engine.bank.gradients,
            engine.optimizer.first,
            engine.optimizer.second,
            engine.best,
            *views,
        )
        width = engine.bank.layout.width
        assert held == slots * 5 * 4 * width
        copies = slots * config.batch_size * width * 2
        assert slots * footprint(model, config, 64).slot == held + copies


def peak_of_a_step(model: ProperModel, config: UsersConfig, slots: int, length: int) -> int:
    """What the forward and backward pass of one step allocate at most, as torch's own profiler counts it."""
    row = EncodedExample("u", tuple(range(3, 3 + length)), length - length // 4)
    jobs = [Job(f"u{at}", torch.zeros(128), (row,) * config.batch_size) for at in range(slots)]
    engine = MultiUserTrainer(model, config, 1e-3, 0, slots, pad=0)
    engine._fill_slots(jobs)
    chosen = {slot: engine.job_in(slot)[0].batch(0, 0, engine.config.batch_size) for slot in range(slots)}
    engine._backward(chosen)
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as seen:
        engine._backward(chosen)
    events = [event for event in seen.profiler.kineto_results.events() if event.name() == "[memory]"]
    now = most = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        now += event.nbytes()
        most = max(most, now)
    return most


@pytest.mark.parametrize(("slots", "length"), [(2, 32), (8, 32), (2, 128)])
def test_a_step_allocates_what_the_formula_says(nano: ProperModel, slots: int, length: int) -> None:
    config = UsersConfig(batch_size=4)
    tokens = slots * config.batch_size * length
    found = peak_of_a_step(nano, config, slots, length)
    parts = footprint(nano, config, length, tokens)
    expected = parts.activations + slots * (parts.slot - 20 * nano.layout(config.rank).width)
    assert 0.7 * expected <= found <= expected, f"{found / 1e6:.1f} MB, the formula says {expected / 1e6:.1f} MB"


def test_as_many_slots_as_fit() -> None:
    parts = Footprint(weights=1000, slot=100, activations=500, pending=50)
    fits = [slots for slots in range(1, 33) if parts.total(slots) <= 4000 * memory.MEMORY_SHARE]
    assert auto_slots(parts, 4000, "cpu") == max(fits) < 32
    assert auto_slots(parts, 10**9, "cpu") == 32 and auto_slots(parts, 10**9, "cuda") == 256
    assert auto_slots(parts, 0, "cpu") == 1, "one user always has to fit"


def test_the_memory_of_a_cpu_is_the_machines() -> None:
    assert 2**28 < device_memory(torch.device("cpu")) < 2**45


def test_at_least_one_finished_adapter_a_slot_may_wait(grouped: Build, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = MultiUserTrainer(grouped(), UsersConfig(), 0.0, 0, 3, pad=0)
    row = 4 * engine.bank.layout.width
    assert pending_rows(engine.bank) == memory.PENDING_BYTES // row > 3
    monkeypatch.setattr(memory, "PENDING_BYTES", row)
    assert pending_rows(engine.bank) == 3


SCRIPT = """
import sys, torch
from proper.config import GroupsConfig, UsersConfig
from proper.models.backbone import load_backbone
from proper.models.personal import ProperModel
from proper.training.multi_user_trainer import MultiUserTrainer
torch.set_num_threads(1)
def resident():
    return int(next(l for l in open("/proc/self/status") if l.startswith("VmRSS")).split()[1]) * 1024
model = ProperModel(load_backbone("proper-nano", torch.bfloat16, torch.device("cpu")))
model.add_plain_targets(GroupsConfig())
before = resident()
engine = MultiUserTrainer(model, UsersConfig(), 0.0, 0, 200, pad=0)
for tensor in (engine.bank.values, engine.bank.gradients, engine.optimizer.first, engine.optimizer.second, engine.best):
    tensor.fill_(1.0)
print(resident() - before, 200 * 20 * engine.bank.layout.width)
"""


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs /proc")
def test_a_process_grows_by_what_its_slots_hold() -> None:
    told = subprocess.run([sys.executable, "-c", SCRIPT], capture_output=True, text=True, check=True).stdout
    grown, expected = (int(number) for number in told.split())
    assert 0.95 * expected < grown < 1.2 * expected
