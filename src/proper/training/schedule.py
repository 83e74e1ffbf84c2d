"""Learning-rate schedules: the value of `auto`, warm-up, and decay to zero."""

from __future__ import annotations

import math
from typing import Literal

from torch import Tensor, where, zeros_like

REFERENCE_WIDTH = 4096
"""Hidden size of Llama-2-7B, on which the paper's rates were chosen."""

PAPER_RATES = {"population": 3e-4, "groups": 2e-4, "users": 2e-4, "router": 2e-4}


def resolve_rate(rate: float | Literal["auto"], stage: str, hidden_size: int) -> float:
    """Return the learning rate of a stage; `auto` is the paper's at the paper's width, times 4096 / hidden size.

    Adam changes every weight by about the rate, and a layer sums over its inputs, so a narrower model needs
    proportionally larger steps for the same change of its outputs (Yang et al. 2022, arXiv 2203.03466).
    """
    return PAPER_RATES[stage] * REFERENCE_WIDTH / hidden_size if rate == "auto" else rate


def factor(step: int, total: int, warmup: float, schedule: str) -> float:
    """Return the factor on the learning rate at `step` (from 0) of `total`."""
    warm = math.ceil(warmup * total)
    if step < warm:
        return (step + 1) / (warm + 1)
    progress = (step - warm) / max(1, total - warm)
    if schedule == "cosine":
        return 0.5 * (1 + math.cos(math.pi * progress))
    return 1 - progress if schedule == "linear" else 1.0


def factors(steps: Tensor, totals: Tensor, warmup: float, schedule: str) -> Tensor:
    """Return `factor` for many users at once, each with its own step and total."""
    steps, totals = steps.double(), totals.double().clamp(min=1)
    warm = (warmup * totals).ceil()
    progress = (steps - warm) / (totals - warm).clamp(min=1)
    falling = {
        "cosine": 0.5 * (1 + (math.pi * progress).cos()),
        "linear": 1 - progress,
        "constant": zeros_like(progress) + 1,
    }[schedule]
    return where(steps < warm, (steps + 1) / (warm + 1), falling)
