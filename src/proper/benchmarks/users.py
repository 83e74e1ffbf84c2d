"""`proper bench users`: adapters trained per hour, against other implementations of per-user training.

    oppu      user by user: PEFT's get_peft_model and transformers' Trainer, as in OPPU
    one_slot  this package's multi-user trainer with one slot
    mixed     this package's multi-user trainer
    ceiling   one LoRA shared by all users in all layers, a plain loop over the same batches as `mixed`

    mixed_N        the multi-user trainer with adapters in the last N layers; the layers below run once per text
    mixed_N_warm   the same after an earlier stage has run the layers below on these texts

All sides train the same items in bf16, batch 4, 2 epochs, and include each user's set-up. The first two train user by
user, so a subset of the users suffices to measure their rate. Each side also has a form with frozen experts, except
OPPU, which has none. The floor is the time of the matrix products alone at the speed of the largest of them.
"""

from __future__ import annotations

import logging
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from proper.benchmarks.measure import TimedSide, interleaved, machine
from proper.benchmarks.training_setup import train_one_by_one
from proper.benchmarks.users_setup import RATE, UsersBench, UsersBenchSize
from proper.config import LastLayers, UsersConfig
from proper.models.backbone import pick_device

logger = logging.getLogger(__name__)

QUICK = UsersBenchSize(users=32, alone=4, repeats=3)
LARGE = UsersBenchSize(users=16, items=12, alone=2, repeats=3)
"""For backbones ten times as large as `proper-nano`."""

EXPERTS = "_experts"
"""The ending of the sides' names with experts."""


def run(size: UsersBenchSize, device: str) -> dict[str, Any]:
    """Return {"setting", "figures", ...} of the benchmark.

    Args:
        size: benchmark size.
        device: "cpu", "cuda" or "auto".
    """
    place = pick_device(device)
    config = UsersConfig(batch_size=4, epochs=2, clip=1.0)
    forms = {form: UsersBench(size, config, place, experts=bool(form)) for form in ("", EXPERTS)}
    plain = forms[""]
    sides: dict[str, Callable[[int], object]] = {
        "oppu": lambda _: train_one_by_one(plain.bare.model, plain.alone, config, RATE, plain.pad)
    }
    for form, bench in forms.items():
        sides |= _sides(bench, size.layers, form)
    logger.info(f"users: {size.users} users x {size.items} items, {size.repeats} repeats of {len(sides)} sides")
    _reset_peak(place)
    plain.fit(plain.jobs, plain.slots)
    peak = _peak(place)
    seconds = interleaved({name: TimedSide(work) for name, work in sides.items()}, size.repeats, logger.info)
    users = {name: size.alone if name.startswith(("oppu", "one_slot")) else size.users for name in sides}
    hourly = {name: 3600 * users[name] / statistics.median(times) for name, times in seconds.items()}
    for bench in forms.values():
        bench.close()
    return {
        "setting": _setting(size, plain, place),
        "figures": {**_ratios(hourly), "padding": plain.padding, "peak_memory_bytes": peak},
        "users_per_hour": {name: round(value, 1) for name, value in hourly.items()},
        "seconds": {name: [round(value, 3) for value in times] for name, times in seconds.items()},
        "floor": _floor(plain, hourly["mixed"]),
    }


def _sides(bench: UsersBench, layers: Sequence[LastLayers], form: str) -> dict[str, Callable[[int], object]]:
    """Return the sides of one form, by name."""
    found: dict[str, Callable[[int], object]] = {
        f"one_slot{form}": lambda _: bench.fit(bench.alone, 1),
        f"mixed{form}": lambda _: bench.fit(bench.jobs, bench.slots),
        f"ceiling{form}": lambda _: bench.shared(),
    }
    for at, each in enumerate(layers):
        name = "mixed" if at == 0 else f"mixed_{each}"
        if at > 0:
            found[f"{name}{form}"] = lambda _, each=each: bench.fit(bench.jobs, bench.slots, each)  # type: ignore[misc]
        if each != "all":
            found[f"{name}_warm{form}"] = lambda _, each=each: bench.fit_warm(each)  # type: ignore[misc]
    return found


def _ratios(hourly: dict[str, float]) -> dict[str, float]:
    """Return the speed ratios of `mixed` to the other sides, and of further sides to the ceiling, in both forms."""
    found = {}
    for form in ("", EXPERTS):
        for other in ("oppu", "one_slot", "ceiling"):
            base = hourly[other if other == "oppu" else other + form]
            found[f"mixed_over_{other}{form}"] = round(hourly[f"mixed{form}"] / base, 3)
        for name, rate in hourly.items():
            if name.startswith("mixed_") and name.endswith(EXPERTS) == bool(form) and name != f"mixed{form}":
                stem = name.removesuffix(form)
                found[f"{stem}_over_ceiling{form}"] = round(rate / hourly[f"ceiling{form}"], 3)
    return found


def _setting(size: UsersBenchSize, bench: UsersBench, device: torch.device) -> dict[str, Any]:
    tokens = [len(row.ids) for job in bench.jobs for row in job.items]
    return {
        **size.backbone.setting(),
        "layers": list(size.layers),
        "device": device.type,
        "machine": machine(device),
        "dtype": "bf16",
        "compile": False,
        "users": size.users,
        "users_one_by_one": size.alone,
        "items": size.items,
        "tokens_per_item": round(statistics.mean(tokens), 1),
        "batch_size": bench.config.batch_size,
        "epochs": bench.config.epochs,
        "rank": bench.config.rank,
        "slots": bench.slots,
        "repeats": size.repeats,
        "torch": torch.__version__,
    }


def _floor(bench: UsersBench, hourly: float) -> dict[str, float]:
    """Return operations and bytes per user, and the share of `mixed`'s time that the products alone would take.

    Forward and backward pass of a frozen layer take 2 products of 2 operations per weight and token; a LoRA takes 3.
    """
    model = bench.bare.model
    weights = sum(p.numel() for name, p in model.named_parameters() if p.dim() == 2 and ".layers." in f".{name}")
    head = model.config.get_text_config().vocab_size * bench.bare.hidden_size
    rows = [row for step in bench.stream for piece in step for _, _, row in piece]
    answers = sum(row.answers for row in rows)
    adapter = bench.model.user_layout(bench.config).width
    operations = 4 * (weights * bench.tokens + head * answers) + 6 * adapter * bench.tokens
    users, speed = len(bench.jobs), _speed(bench)
    # Per optimizer step of a user, gradients, values and both moments are read, and all but the gradients are written.
    steps = sum(len({slot for piece in step for slot, _, _ in piece}) for step in bench.stream)
    return {
        "operations_per_user": round(operations / users),
        "optimizer_bytes_per_user": round(7 * 4 * adapter * steps / users),
        "operations_per_second": round(speed),
        "share_of_mixed": round(operations / users / speed / (3600 / hourly), 3),
    }


def _speed(bench: UsersBench) -> float:
    """Return operations per second of the FFN's matrix product at 1,024 tokens, median of 20."""
    tokens = 1024
    weight = next(p for name, p in bench.bare.model.named_parameters() if "gate_proj" in name or "up_proj" in name)
    x = torch.randn(tokens, weight.shape[1], dtype=weight.dtype, device=weight.device)
    times = []
    for _ in range(20):
        started = time.perf_counter()
        torch.nn.functional.linear(x, weight)
        if weight.device.type == "cuda":
            torch.cuda.synchronize()
        times.append(time.perf_counter() - started)
    return 2 * tokens * weight.numel() / statistics.median(times)


def _reset_peak(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    elif Path("/proc/self/clear_refs").exists():
        Path("/proc/self/clear_refs").write_text("5")


def _peak(device: torch.device) -> int:
    """Return the peak memory in bytes since `_reset_peak`: of the GPU's allocator, or of the whole process."""
    if device.type == "cuda":
        return int(torch.cuda.max_memory_allocated(device))
    status = Path("/proc/self/status")
    lines = status.read_text().splitlines() if status.exists() else []
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM")), 0)
