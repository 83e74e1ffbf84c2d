"""Many users in one batch, each trained exactly as if alone."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import LoraConfig, get_peft_model
from torch import Tensor

from proper.config import GroupsConfig, UsersConfig
from proper.data.batching import collate
from proper.data.encoder import EncodedExample
from proper.layers.batch_context import Mode
from proper.layers.layout import Layout
from proper.models.answer_loss import answer_logits, answer_loss
from proper.models.backbone import Backbone
from proper.models.personal import ProperModel
from proper.training import microbatching as micro_module
from proper.training.checkpoint import Checkpoint
from proper.training.jobs import FitProgress, FitResult, Job
from proper.training.microbatching import micro_batches, row_losses
from proper.training.multi_user_trainer import MultiUserTrainer
from proper.training.optim import rate_factor
from tests.training.held_out_losses import held_out_losses

Build = Callable[..., ProperModel]
Results = dict[str, tuple[FitProgress, Tensor]]

RATE = 5e-3


class Stopped(Exception):
    """What a test throws into a run."""


def fit(
    model: ProperModel,
    jobs: Sequence[Job],
    folder: Path,
    *,
    slots: int,
    stop_at: int | None = None,
    seconds: float = 1e9,
    rate: float = RATE,
    log: list[dict[str, Any]] | None = None,
    results: Results | None = None,
    refused: dict[str, str] | None = None,
    **users: Any,
) -> tuple[Results, MultiUserTrainer]:
    """Run an engine; `stop_at` throws once that many steps are logged."""
    engine = MultiUserTrainer(model, UsersConfig(**users), rate, 0, slots, pad=0)
    found: Results = {} if results is None else results
    steps = []

    def done(outcomes: Sequence[FitResult], again: bool) -> None:
        for outcome in outcomes:
            if outcome.row is not None:
                found[outcome.user] = (copy.deepcopy(outcome.state), outcome.row.clone())
            elif refused is not None and outcome.reason is not None:
                refused[outcome.user] = outcome.reason

    def told(facts: dict[str, Any]) -> None:
        steps.append(facts)
        if log is not None:
            log.append(facts)
        if stop_at is not None and len(steps) == stop_at:
            raise Stopped

    engine.run(jobs, done, Checkpoint(folder / "engine.checkpoint", seconds), told, "fit")
    return found, engine


def assert_close(layout: Layout, found: Tensor, expected: Tensor, tolerance: float = 1e-4) -> None:
    """Within `tolerance` of each tensor's norm."""
    mine, theirs = layout.unpack(found), layout.unpack(expected)
    for name in theirs:
        distance, norm = float((mine[name] - theirs[name]).norm()), float(theirs[name].norm())
        assert norm > 0 and distance <= tolerance * norm, f"{name}: {distance / norm:.1e}"


@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_mixed_users_are_trained_as_each_alone(grouped: Build, jobs: list[Job], tmp_path: Path, dropout: float) -> None:
    options: dict[str, Any] = {"dropout": dropout, "batch_size": 3, "weight_decay": 0.05}
    alone: Results = {}
    for number, job in enumerate(jobs):
        fit(grouped(), [job], tmp_path / str(number), slots=1, results=alone, **options)
    for slots in (1, 2, 5, 8):
        mixed, engine = fit(grouped(), jobs, tmp_path / f"slots{slots}", slots=slots, **options)
        assert list(sorted(mixed)) == sorted(job.user for job in jobs)
        for job in jobs:
            state, row = mixed[job.user]
            assert (state.step, state.best) == (2 * -(-len(job.items) // 3), 2)
            assert state.trained == pytest.approx(alone[job.user][0].trained, rel=1e-4)
            assert_close(engine.bank.layout, row, alone[job.user][1])
            if slots == 1:
                assert torch.equal(row, alone[job.user][1]), "a slot that is used again starts clean"


def test_one_user_is_trained_as_peft_and_adamw_would(
    backbone: Callable[..., Backbone], jobs: list[Job], tmp_path: Path
) -> None:
    job, config = jobs[3], UsersConfig(rank=2, alpha=6.0, batch_size=4, weight_decay=0.1, clip=0.5)
    model = ProperModel(backbone())
    model.add_plain_targets(GroupsConfig())
    options = {name: getattr(config, name) for name in ("rank", "alpha", "batch_size", "weight_decay", "clip")}
    found, engine = fit(model, [job], tmp_path, slots=1, **options)

    slow = backbone()
    names = list(model.layers)
    lora = get_peft_model(
        slow.model, LoraConfig(task_type="CAUSAL_LM", r=2, lora_alpha=6, lora_dropout=0.0, target_modules=names)
    )
    scratch = ProperModel(backbone())
    scratch.add_plain_targets(GroupsConfig())
    clean = MultiUserTrainer(scratch, config, 0.0, 0, 1, pad=0)
    clean._fill_slots([job])
    first = clean.bank.values[0].clone()
    parameters = {}
    for piece in engine.bank.layout.pieces:
        part = "lora_A" if piece.down else "lora_B"
        parameter = lora.get_parameter(f"base_model.model.{piece.module}.{part}.default.weight")
        parameter.data.copy_(first[piece.offset : piece.offset + piece.size].view(piece.shape))
        parameters[piece] = parameter
    optimizer = torch.optim.AdamW(list(parameters.values()), lr=1.0, weight_decay=0.1)
    for step in range(8):
        rows = job.batch(0, step, config.batch_size)
        batch = collate(rows, pad=0)
        total, tokens = answer_loss(answer_logits(lora, batch), batch.labels)
        optimizer.zero_grad()
        (total.sum() / tokens.sum()).backward()
        torch.nn.utils.clip_grad_norm_(list(parameters.values()), 0.5)
        optimizer.param_groups[0]["lr"] = RATE * rate_factor(step, 8, config.warmup, config.schedule)
        optimizer.step()
    expected = torch.zeros_like(first)
    for piece, parameter in parameters.items():
        expected[piece.offset : piece.offset + piece.size] = parameter.detach().reshape(-1)
    assert_close(engine.bank.layout, found[job.user][1], expected)


def test_every_item_is_seen_once_per_pass(jobs: list[Job]) -> None:
    for job in jobs:
        steps = job.steps_per_pass(4)
        orders = []
        for epoch in range(3):
            seen = [row for at in range(steps) for row in job.batch(0, epoch * steps + at, 4)]
            assert sorted(row.ids for row in seen) == sorted(row.ids for row in job.items)
            orders.append([row.ids for row in seen])
        assert orders[0] != orders[1] or len(job.items) < 4


def test_whoever_is_not_in_a_step_does_not_move(grouped: Build, jobs: list[Job], tmp_path: Path) -> None:
    """Users finish at different steps; the slots of those who are done stay as they were handed over."""
    mixed, engine = fit(grouped(), jobs, tmp_path, slots=8, batch_size=3, weight_decay=0.5)
    assert len({state.step for state, _ in mixed.values()}) > 2
    for slot, job in enumerate(jobs):
        assert torch.equal(engine.bank.values[slot], mixed[job.user][1])
        assert int(engine.optimizer.steps[slot]) == mixed[job.user][0].step
        assert engine.optimizer.first[slot].any()
    for slot in range(len(jobs), 8):
        assert not engine.bank.values[slot].any() and not engine.optimizer.second[slot].any()


def test_a_step_leaves_other_slots_untouched_to_the_bit(grouped: Build, jobs: list[Job]) -> None:
    model = grouped()
    experts = {name: p.clone() for name, p in model.group_parameters().items()}
    engine = MultiUserTrainer(model, UsersConfig(weight_decay=0.5, warmup=0.0), RATE, 0, 3, pad=0)
    engine._fill_slots(jobs[:3])
    for _ in range(2):
        engine._step()
    absent = engine.slots[1]
    engine.slots[1] = None
    before = [tensor[1].clone() for tensor in (engine.bank.values, engine.optimizer.first, engine.optimizer.second)]
    others = engine.bank.values[[0, 2]].clone()

    engine._step()

    now = [tensor[1] for tensor in (engine.bank.values, engine.optimizer.first, engine.optimizer.second)]
    assert all(torch.equal(one, other) for one, other in zip(before, now, strict=True)) and before[1].any()
    assert engine.optimizer.steps.tolist() == [3, 2, 3] and absent is not None
    assert not torch.equal(engine.bank.values[[0, 2]], others)
    assert all(torch.equal(p, experts[name]) for name, p in model.group_parameters().items())


def hold_out(job: Job, items: int, epochs: int) -> Job:
    return replace(job, items=job.items[:-items], held_out=job.items[-items:], epochs=epochs)


def test_training_stops_early_and_the_best_pass_is_kept(grouped: Build, jobs: list[Job], tmp_path: Path) -> None:
    held = [hold_out(job, 2, epochs=12) for job in jobs[1:4]]
    found, engine = fit(grouped(), held, tmp_path, slots=2, rate=0.03, patience=2, schedule="constant", batch_size=4)
    stopped = 0
    for job in held:
        state, row = found[job.user]
        passes = state.step / -(-len(job.items) // 4)
        assert len(state.losses) == passes + 1
        assert state.losses[state.best] == min(state.losses)
        assert passes == min(12, state.best + 2)
        stopped += passes < 12
        engine.bank.values[0] = row
        assert held_out_losses(engine.model, {0: job}, "fit", 0)[0] == pytest.approx(min(state.losses), rel=1e-5)
    assert stopped, "this rate is too high on purpose"
    # The same user, trained for as long as was best and no longer, ends in the same place.
    job = held[0]
    best = found[job.user][0].best
    if best:
        again, _ = fit(
            grouped(), [replace(job, held_out=(), epochs=best, horizon=12)], tmp_path / "again", slots=1, rate=0.03,
            schedule="constant", batch_size=4,
        )  # fmt: skip
        assert_close(engine.bank.layout, again[job.user][1], found[job.user][1])


def test_a_user_who_only_gets_worse_keeps_the_start(grouped: Build, jobs: list[Job], tmp_path: Path) -> None:
    job = hold_out(jobs[1], 2, epochs=5)
    found, _ = fit(grouped(), [job], tmp_path, slots=1, rate=3.0, patience=1, schedule="constant")
    state, row = found[job.user]
    assert state.best == 0 and len(state.losses) == 2 and state.losses[1] > state.losses[0]
    model = grouped()
    clean = MultiUserTrainer(model, UsersConfig(), 0.0, 0, 1, pad=0)
    clean._fill_slots([job])
    assert torch.equal(row, clean.bank.values[0])


def test_held_out_losses_are_means_over_answer_tokens(grouped: Build, jobs: list[Job]) -> None:
    model = grouped()
    engine = MultiUserTrainer(model, UsersConfig(), RATE, 0, 3, pad=0)
    held = [hold_out(job, 3, epochs=1) for job in jobs[1:4]]
    engine._fill_slots(held)
    engine.bank.values.normal_(std=0.2)
    slots = dict(enumerate(held))
    modes: tuple[Mode, ...] = ("groups", "fit")
    for mode in modes:
        found = held_out_losses(model, slots, mode, 0)
        for slot, job in slots.items():
            sums = tokens = 0.0
            for row in job.held_out:
                with torch.no_grad():
                    total, _ = row_losses(model, slots, [(slot, 0, row)], mode, 0)
                sums, tokens = sums + float(total), tokens + len(row.ids) - row.start
            assert found[slot] == pytest.approx(sums / tokens, rel=1e-5)
    assert held_out_losses(model, {}, "fit", 0) == {}


@given(
    lengths=st.lists(st.integers(2, 60), max_size=40),
    budget=st.integers(20, 200),
)
@settings(max_examples=60)
def test_micro_batches_hold_every_row_once_within_the_budget(lengths: list[int], budget: int) -> None:
    work = [(at % 3, at, EncodedExample("u", tuple(range(length)), 1)) for at, length in enumerate(lengths)]
    before = micro_module.MICRO_TOKENS
    micro_module.MICRO_TOKENS = budget
    try:
        cut = list(micro_batches(work))
    finally:
        micro_module.MICRO_TOKENS = before
    assert sorted(at for batch in cut for _, at, _ in batch) == list(range(len(lengths)))
    for batch in cut:
        padded = len(batch) * max(len(row.ids) for _, _, row in batch)
        assert batch and (padded <= budget or len(batch) == 1)


def test_small_micro_batches_change_nothing(
    grouped: Build, jobs: list[Job], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, engine = fit(grouped(), jobs, tmp_path / "whole", slots=5, dropout=0.2)
    monkeypatch.setattr(micro_module, "MICRO_TOKENS", 40)
    cut, _ = fit(grouped(), jobs, tmp_path / "cut", slots=5, dropout=0.2)
    for user, (_, row) in whole.items():
        assert_close(engine.bank.layout, cut[user][1], row)


@pytest.mark.parametrize("stop_at", [1, 3, 6])
def test_a_resumed_run_gives_the_same_bits(grouped: Build, jobs: list[Job], tmp_path: Path, stop_at: int) -> None:
    work = [hold_out(job, 1, epochs=3) if at % 2 else job for at, job in enumerate(jobs)]
    options: dict[str, Any] = {"slots": 2, "batch_size": 3, "dropout": 0.2}
    log: list[dict[str, Any]] = []
    whole, _ = fit(grouped(), work, tmp_path / "whole", log=log, **options)

    found: Results = {}
    again: list[dict[str, Any]] = []
    with pytest.raises(Stopped):
        fit(grouped(), work, tmp_path / "cut", stop_at=stop_at, seconds=0, results=found, **options)
    with pytest.raises(Stopped):
        fit(grouped(), work, tmp_path / "cut", stop_at=2, seconds=0, results=found, **options)
    fit(grouped(), work, tmp_path / "cut", seconds=0, results=found, log=again, **options)

    assert found.keys() == whole.keys()
    for user, (state, row) in whole.items():
        assert torch.equal(found[user][1], row) and found[user][0] == state
    strip = [{key: value for key, value in facts.items() if key != "seconds"} for facts in (*log, *again)]
    assert strip[len(log) :] == strip[len(log) - len(again) : len(log)], "the log goes on where it stopped"


def test_in_bf16_adapters_and_moments_stay_fp32(grouped: Build, jobs: list[Job], tmp_path: Path) -> None:
    _, engine = fit(grouped(torch.bfloat16), jobs[:2], tmp_path, slots=2)
    tensors = (engine.bank.values, engine.bank.gradients, engine.optimizer.first, engine.optimizer.second, engine.best)
    assert {tensor.dtype for tensor in tensors if tensor is not None} == {torch.float32}
    assert engine.bank.values.isfinite().all()


def test_losses_fall(grouped: Build, jobs: list[Job], tmp_path: Path) -> None:
    log: list[dict[str, Any]] = []
    fit(grouped(), [replace(job, epochs=8) for job in jobs], tmp_path, slots=5, log=log)
    assert log[-1]["loss"] < 0.95 * log[0]["loss"]
    assert log[0]["users"] == 5 and [facts["step"] for facts in log] == list(range(1, len(log) + 1))
