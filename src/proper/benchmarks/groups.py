"""`proper bench groups`: a stage 2 step with fused experts against a loop over experts and against one wider LoRA.

    fused  experts stacked: two matrix products per module with the gates between them (this package's implementation)
    loop   the same experts one after another, as in the equation
    plain  one LoRA of rank E*R on the same modules: equal parameters, no router, no gates, no user embeddings
    bare   a LoRA of rank 1 on the first module only, so that the backward pass goes through the whole backbone

`bare` is the floor: no implementation of experts can be faster, so the speedup of fused over loop is at most
loop / bare. A step is forward pass, backward pass and optimizer update, on the same rows, in bf16, without dropout.
"""

from __future__ import annotations

import logging
import random
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from accelerate import Accelerator
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional

from proper.benchmarks.backbones import BenchBackbone
from proper.benchmarks.measure import TimedSide, interleaved, machine
from proper.benchmarks.training_setup import DTYPE, share_lora, synthetic_users
from proper.config import GroupsConfig
from proper.data.batching import Batch, collate
from proper.data.encoder import Encoder
from proper.layers.experts import Experts, tokens_last
from proper.models.answer_loss import answer_losses
from proper.models.backbone import pick_device
from proper.models.personal import ProperModel
from proper.training.groups import GroupsStage

logger = logging.getLogger(__name__)

RATE = 1e-3
CLIP = 1.0
MAX_LENGTH = 256


@dataclass(frozen=True)
class GroupsBenchSize:
    """Benchmark size: `steps` are timed together, `repeats` times."""

    rows: int = 64
    steps: int = 4
    repeats: int = 15
    backbone: BenchBackbone = BenchBackbone()


QUICK = GroupsBenchSize(steps=2, repeats=7)


class LoopedExperts(nn.Module):
    """Parameters of `Experts`, with the experts computed one by one, as in the method's equation: sum_i w_i B_i A_i x.

    Attributes:
        down, up: those of the fused experts.
    """

    def __init__(self, fused: Experts) -> None:
        super().__init__()
        self.experts, self.rank, self.scale = fused.experts, fused.rank, fused.scale
        self.down, self.up = fused.down, fused.up

    def forward(
        self,
        x: Float[Tensor, "B T I"],
        gates: Float[Tensor, "B T E"],
        onto: Float[Tensor, "B T O"] | None = None,
        middle: Float[Tensor, "ER B T"] | None = None,
    ) -> Float[Tensor, "B T O"]:
        """Return the gated sum of the experts' outputs, added to `onto` if given."""
        weights = (gates * self.scale).to(x.dtype)
        total = onto
        for expert in range(self.experts):
            part = slice(expert * self.rank, (expert + 1) * self.rank)
            middle = functional.linear(x, self.down[part].to(x.dtype))
            mixed = weights[..., expert : expert + 1] * functional.linear(middle, self.up[:, part].to(x.dtype))
            total = mixed if total is None else total + mixed
        assert total is not None
        return total

    def products(self, x: Float[Tensor, "B T I"], token: Float[Tensor, "E I"]) -> tuple[None, Float[Tensor, "E B T"]]:
        """Return only the router's product: the experts' products are computed one by one in `forward`."""
        return None, tokens_last(token, x)


def run(size: GroupsBenchSize, device: str) -> dict[str, Any]:
    """Return {"setting", "figures", "seconds_per_step"} of the benchmark.

    Args:
        size: benchmark size.
        device: "cpu", "cuda" or "auto".
    """
    place, config = pick_device(device), GroupsConfig(dropout=0.0)
    bare = size.backbone.load(DTYPE, place)
    histories = synthetic_users(Encoder(bare.tokenizer, MAX_LENGTH), users=size.rows // 4, items=8)
    rows = [row for items in histories.values() for row in items]
    shuffle = random.Random(0)
    batches = [collate(shuffle.sample(rows, size.rows), bare.pad_id, place) for _ in range(size.steps)]
    users = list(histories)
    sides = {
        "fused": _stage(size, config, users, batches, place, looped=False),
        "loop": _stage(size, config, users, batches, place, looped=True),
        "plain": _plain(size, config.expert_count * config.rank, None, batches, place),
        "bare": _plain(size, 1, 1, batches, place),
    }
    logger.info(f"groups: {size.repeats} repeats of {size.steps} steps of {size.rows} rows, {len(sides)} sides")
    seconds = interleaved({name: TimedSide(work) for name, work in sides.items()}, size.repeats, logger.info)
    step = {name: statistics.median(times) / size.steps for name, times in seconds.items()}
    return {
        "setting": {
            **size.backbone.setting(),
            "device": place.type,
            "machine": machine(place),
            "dtype": "bf16",
            "compile": False,
            "rows": size.rows,
            "tokens": sum(batch.tokens for batch in batches) // size.steps,
            "experts": config.expert_count,
            "rank": config.rank,
            "repeats": size.repeats,
            "torch": torch.__version__,
        },
        "figures": {
            "fused_over_loop": round(step["loop"] / step["fused"], 3),
            "fused_over_plain": round(step["plain"] / step["fused"], 3),
            "bare_over_loop": round(step["loop"] / step["bare"], 3),
            "experts_fused_over_loop": round((step["loop"] - step["bare"]) / (step["fused"] - step["bare"]), 3),
        },
        "seconds_per_step": {name: round(value, 4) for name, value in step.items()},
    }


def _stage(
    size: GroupsBenchSize,
    config: GroupsConfig,
    users: Sequence[str],
    batches: Sequence[Batch],
    device: torch.device,
    *,
    looped: bool,
) -> Callable[[int], None]:
    """Return stage 2's training step on these batches."""
    model = ProperModel(size.backbone.load(DTYPE, device))
    model.add_experts(config, seed=0)
    if looped:
        for layer in model.layers.values():
            assert layer.experts is not None
            # The layer calls only what both have.
            layer.experts = cast(Experts, LoopedExperts(layer.experts))
    stage = GroupsStage(model, config, users, 0, Accelerator(cpu=device.type == "cpu", mixed_precision="no"))
    parameters = list(stage.parameters().values())
    optimizer = torch.optim.AdamW(parameters, lr=RATE)

    def steps(_: int) -> None:
        for batch in batches:
            optimizer.zero_grad()
            loss = stage.loss(batch, progress=1.0)
            torch.autograd.backward(loss.objective(loss.tokens))
            torch.nn.utils.clip_grad_norm_(parameters, CLIP)
            optimizer.step()
            stage.after_backward(1.0)

    return steps


def _plain(
    size: GroupsBenchSize, rank: int, modules: int | None, batches: Sequence[Batch], device: torch.device
) -> Callable[[int], None]:
    """Return the training step of one LoRA shared by all users, on all modules or the first few."""
    model = size.backbone.load(DTYPE, device).model
    parameters = share_lora(model, rank, 2 * rank, modules)
    optimizer = torch.optim.AdamW(parameters, lr=RATE)

    def steps(_: int) -> None:
        for batch in batches:
            optimizer.zero_grad()
            total, tokens = answer_losses(model, batch)
            torch.autograd.backward(total.sum() / tokens.sum())
            torch.nn.utils.clip_grad_norm_(parameters, CLIP)
            optimizer.step()

    return steps
