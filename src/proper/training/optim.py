"""Optimizers' parts: learning rates (`auto`, warm-up, decay), and row-wise AdamW for tensors whose first axis is users.

`RowAdamW` updates only the rows of a step's users. Plain AdamW also updates and decays rows whose gradient is zero,
because their moments are not zero. Here every row has its own step count, and an absent row keeps its values, moments
and count bit for bit. Formulas: Loshchilov & Hutter 2019 (arXiv 1711.05101), with bias correction from the row's own
count.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor

REFERENCE_WIDTH = 4096
"""Hidden size of Llama-2-7B, on which the paper's rates were chosen."""

PAPER_RATES = {"population": 3e-4, "groups": 2e-4, "users": 2e-4, "router": 2e-4}
"""The paper's learning rates by stage; `router` is stage 3b."""


def resolve_rate(rate: float | Literal["auto"], stage: str, hidden_size: int) -> float:
    """Return the learning rate of a stage; `auto` is the paper's at the paper's width, times 4096 / hidden size.

    Adam changes every weight by about the rate, and a layer sums over its inputs, so a narrower model needs
    proportionally larger steps for the same change of its outputs (Yang et al. 2022, arXiv 2203.03466).
    """
    return PAPER_RATES[stage] * REFERENCE_WIDTH / hidden_size if rate == "auto" else rate


def rate_factor(step: int, total: int, warmup: float, schedule: str) -> float:
    """Return the factor on the learning rate at `step` (from 0) of `total`."""
    warm = math.ceil(warmup * total)
    if step < warm:
        return (step + 1) / (warm + 1)
    progress = (step - warm) / max(1, total - warm)
    if schedule == "cosine":
        return 0.5 * (1 + math.cos(math.pi * progress))
    return 1 - progress if schedule == "linear" else 1.0


@dataclass
class RowAdamW:
    """Moments and step counts for N rows of P numbers.

    Attributes:
        first, second: the moments (N, P), in the values' dtype.
        steps: each row's own step count (N,), on the CPU.
    """

    first: Float[Tensor, "N P"]
    second: Float[Tensor, "N P"]
    steps: Int[Tensor, "N"]
    betas: tuple[float, float] = (0.9, 0.999)
    epsilon: float = 1e-8
    weight_decay: float = 0.0

    @classmethod
    def of(cls, values: Float[Tensor, "N P"], weight_decay: float = 0.0) -> RowAdamW:
        """Return fresh state for `values`."""
        steps = torch.zeros(values.shape[0], dtype=torch.long)
        return cls(torch.zeros_like(values), torch.zeros_like(values), steps, weight_decay=weight_decay)

    def reset(self, row: int) -> None:
        """Reset a row's moments and step count to zero."""
        self.first[row] = 0
        self.second[row] = 0
        self.steps[row] = 0

    def step(
        self,
        values: Float[Tensor, "N P"],
        rows: Int[Tensor, "n"],
        gradients: Iterable[Float[Tensor, "P"]],
        rates: Sequence[float] | float,
    ) -> None:
        """Update `values[rows]` by one step, each at its own rate; `rows` are distinct, `gradients` in their order."""
        self.steps[rows] += 1
        counts = self.steps[rows].tolist()
        each = rates if isinstance(rates, Sequence) else [rates] * len(counts)
        # Update row by row, in place: a row stays in the CPU cache for all passes over it.
        for row, gradient, count, rate in zip(rows.tolist(), gradients, counts, each, strict=True):
            self._move(values[row], row, gradient, count, rate)

    def _move(self, value: Float[Tensor, "P"], row: int, gradient: Float[Tensor, "P"], count: int, rate: float) -> None:
        beta1, beta2 = self.betas
        first = self.first[row].lerp_(gradient, 1 - beta1)
        second = self.second[row].mul_(beta2).addcmul_(gradient, gradient, value=1 - beta2)
        spread = second.sqrt().div_((1 - beta2**count) ** 0.5).add_(self.epsilon)
        if self.weight_decay:
            value.mul_(1 - rate * self.weight_decay)
        value.addcdiv_(first, spread, value=-rate / (1 - beta1**count))

    def tensors(self, prefix: str = "") -> dict[str, Tensor]:
        """Return the state for a checkpoint, under names that begin with `prefix`."""
        return {f"{prefix}first": self.first, f"{prefix}second": self.second, f"{prefix}steps": self.steps}

    def restore(self, tensors: Mapping[str, Tensor], prefix: str = "") -> None:
        """Restore the state from a checkpoint with the tensors of `tensors`."""
        for name, own in self.tensors(prefix).items():
            own.copy_(tensors[name])


def clip_rows(gradients: Float[Tensor, "n P"], limit: float) -> Float[Tensor, "n P"]:
    """Scale every row down to at most `limit` in 2-norm, each by its own norm (fp32)."""
    norms = torch.linalg.vector_norm(gradients, dim=1, keepdim=True)
    clipped: Tensor = gradients * (limit / norms.clamp(min=1e-12)).clamp(max=1)
    return clipped


def clip_row_(gradient: Float[Tensor, "P"], limit: float) -> float:
    """Clip one row to a 2-norm of at most `limit`, in place; return its old norm. A non-finite norm changes nothing."""
    norm = float(torch.linalg.vector_norm(gradient))
    if limit < norm < float("inf"):
        gradient.mul_(limit / norm)
    return norm
