"""Every user is trained as if alone: with any other users, in any order, killed or not."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from transformers import GPT2Config, GPT2LMHeadModel

from proper.config import GroupsConfig, UsersConfig
from proper.data.encoder import EncodedExample
from proper.models.backbone import Backbone
from proper.models.personal import ProperModel
from proper.training.checkpoint import Checkpoint
from proper.training.jobs import FitResult, Job
from proper.training.multi_user_trainer import MultiUserTrainer

# fp32 sums in another order differ by some 1e-6 of a norm, AdamW makes the most of it where a gradient is near zero.
TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-4}

EXPERTS = GroupsConfig(user_embedding=4, experts=2, rank=2)


class Killed(Exception):
    """What a test throws into a run."""


def build(dtype: torch.dtype) -> ProperModel:
    """A GPT-2, which computes in fp64 throughout (Llama's norm is always in fp32), with random frozen experts."""
    config = GPT2Config(
        n_embd=16,
        n_layer=2,
        n_head=2,
        n_positions=64,
        vocab_size=48,
        initializer_range=0.3,
        attn_implementation="eager",
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        network = GPT2LMHeadModel(config).to(dtype).eval().requires_grad_(False)
        model = ProperModel(Backbone("tiny", network, None, ""))
        model.add_experts(EXPERTS, seed=0)
        for layer in model.layers.values():
            assert layer.experts is not None and layer.router is not None
            layer.experts.to(dtype)
            layer.router.to(dtype)
        for parameter in model.group_parameters().values():
            parameter.data.normal_(std=0.3)
            parameter.requires_grad_(False)
    return model


MODELS = {dtype: build(dtype) for dtype in TOLERANCE}


@st.composite
def work(draw: st.DrawFn) -> list[Job]:
    """Users in any order, with histories of any lengths, some of them with items held out."""
    stops = draw(st.booleans())
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    jobs = []
    for at in range(draw(st.integers(1, 5))):
        rows = []
        for _ in range(draw(st.integers(1 + stops, 7))):
            prompt, answer = (int(torch.randint(1, most, (1,), generator=generator)) for most in (12, 4))
            ids = torch.randint(0, 48, (prompt + answer,), generator=generator).tolist()
            rows.append(EncodedExample(f"u{at}", tuple(ids), prompt))
        cut = len(rows) - 1 if stops else len(rows)
        embedding = torch.randn(4, generator=generator)
        jobs.append(Job(f"u{at}", embedding, tuple(rows[:cut]), tuple(rows[cut:]), epochs=draw(st.integers(1, 3))))
    return draw(st.permutations(jobs))


def fit(
    model: ProperModel, jobs: Sequence[Job], slots: int, config: UsersConfig, kill_at: int | None = None
) -> tuple[dict[str, Tensor], MultiUserTrainer]:
    """Train; with `kill_at`, throw after that many steps, and go on with a fresh engine."""
    found: dict[str, Tensor] = {}

    def done(outcomes: Sequence[FitResult], again: bool) -> None:
        for outcome in outcomes:
            assert outcome.row is not None
            if outcome.user in found:
                assert again and torch.equal(found[outcome.user], outcome.row), "no user is trained twice"
            found[outcome.user] = outcome.row

    def told(facts: dict[str, Any]) -> None:
        if facts["step"] == kill_at:
            raise Killed

    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder) / "engine.checkpoint"
        engine = MultiUserTrainer(model, config, 5e-3, 0, slots, pad=0)
        try:
            engine.run(jobs, done, Checkpoint(place, 1e-9), told, "fit")
        except Killed:
            kill_at = None
            engine = MultiUserTrainer(model, config, 5e-3, 0, slots, pad=0)
            engine.run(jobs, done, Checkpoint(place, 1e-9), told, "fit")
    return found, engine


@pytest.mark.parametrize("dtype", list(TOLERANCE), ids=["fp64", "fp32"])
@given(
    jobs=work(),
    slots=st.integers(1, 5),
    dropout=st.sampled_from([0.0, 0.3]),
    size=st.integers(1, 4),
    kill_at=st.none() | st.integers(1, 8),
)
@settings(max_examples=20)
def test_mixed_is_alone(
    dtype: torch.dtype, jobs: list[Job], slots: int, dropout: float, size: int, kill_at: int | None
) -> None:
    model = MODELS[dtype]
    config = UsersConfig(rank=2, batch_size=size, dropout=dropout, weight_decay=0.05, patience=1)
    jobs = [replace(job, embedding=job.embedding.to(dtype)) for job in jobs]
    mixed, engine = fit(model, jobs, slots, config, kill_at)
    assert mixed.keys() == {job.user for job in jobs}
    for job in jobs:
        alone, _ = fit(model, [job], 1, config)
        theirs, mine = (engine.bank.layout.unpack(row) for row in (alone[job.user], mixed[job.user]))
        assert mixed[job.user].dtype == dtype
        for name, tensor in theirs.items():
            distance = float((mine[name] - tensor).norm())
            assert distance <= TOLERANCE[dtype] * float(tensor.norm()), f"{job.user} {name}: {distance:.1e}"


def test_a_killed_run_gives_the_same_bits_and_hands_nobody_over_twice() -> None:
    model, config = MODELS[torch.float32], UsersConfig(rank=2, batch_size=2, dropout=0.1)
    generator = torch.Generator().manual_seed(3)
    jobs = []
    for at, items in enumerate((3, 1, 5, 2, 4, 1)):
        ids = torch.randint(0, 48, (items, 6), generator=generator).tolist()
        jobs.append(Job(f"u{at}", torch.randn(4), tuple(EncodedExample("u", tuple(row), 4) for row in ids), epochs=2))
    whole, engine = fit(model, jobs, 2, config)
    for kill_at in range(1, engine.steps + 1):
        again, _ = fit(model, jobs, 2, config, kill_at)
        assert again.keys() == whole.keys()
        assert all(torch.equal(row, whole[user]) for user, row in again.items())
