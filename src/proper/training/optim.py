"""AdamW for tensors whose first axis is users: only the users in this step move.

A plain AdamW moves and decays rows whose gradient is zero, because their moments are not. Here every row has its own
step count, and a row that is absent keeps its values, moments and count to the bit. Formulas: Loshchilov & Hutter 2019
(arXiv 1711.05101), with bias correction from the row's own count.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor


@dataclass
class RowAdamW:
    """Moments and step counts for N rows of P numbers.

    Attributes:
        first, second: the moments (N, P), fp32.
        steps: each row's own step count (N,).
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
        steps = torch.zeros(values.shape[0], dtype=torch.long, device=values.device)
        return cls(torch.zeros_like(values), torch.zeros_like(values), steps, weight_decay=weight_decay)

    def reset(self, row: int) -> None:
        """Forget everything about a row."""
        self.first[row] = 0
        self.second[row] = 0
        self.steps[row] = 0

    def step(
        self,
        values: Float[Tensor, "N P"],
        rows: Int[Tensor, "n"],
        gradients: Float[Tensor, "n P"],
        rates: Float[Tensor, "n"] | float,
    ) -> None:
        """Move `values[rows]` by one step, each at its own rate; `rows` are distinct."""
        beta1, beta2 = self.betas
        self.steps[rows] += 1
        count = self.steps[rows].double().unsqueeze(1)
        first = torch.lerp(self.first[rows], gradients, 1 - beta1)
        second = torch.lerp(self.second[rows], gradients.square(), 1 - beta2)
        self.first[rows], self.second[rows] = first, second
        rate = torch.as_tensor(rates, dtype=torch.float64, device=values.device).reshape(-1, 1)
        size = (rate / (1 - beta1**count)).to(values.dtype)
        spread = (second.sqrt() / (1 - beta2**count).sqrt().to(values.dtype)).add_(self.epsilon)
        kept = values[rows] * (1 - rate * self.weight_decay).to(values.dtype)
        values[rows] = kept - size * first / spread

    def tensors(self) -> dict[str, Tensor]:
        """Return the state for a checkpoint."""
        return {"first": self.first, "second": self.second, "steps": self.steps}

    def restore(self, tensors: dict[str, Tensor]) -> None:
        """Put back what `tensors` returned."""
        self.first.copy_(tensors["first"])
        self.second.copy_(tensors["second"])
        self.steps.copy_(tensors["steps"])


def clip_rows(gradients: Float[Tensor, "n P"], limit: float) -> Float[Tensor, "n P"]:
    """Scale every row down to at most `limit` in 2-norm, each by its own norm (fp32)."""
    norms = torch.linalg.vector_norm(gradients, dim=1, keepdim=True)
    clipped: Tensor = gradients * (limit / norms.clamp(min=1e-12)).clamp(max=1)
    return clipped
