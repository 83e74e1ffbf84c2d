"""The next token of each row, every row by its own rules and its own random numbers.

A row's draws come from a generator seeded by its request, so they do not depend on who else is in the batch. Knows
nothing about models or users.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from proper.errors import ProperError

LEAST = -9999.0
"""The log-probability of what cannot come; OpenAI's for what is very unlikely."""


@dataclass(frozen=True)
class Sampling:
    """How a request's tokens are drawn.

    Attributes:
        max_new_tokens: the longest answer.
        temperature: 0 takes the likeliest token.
        top_p: draw among the likeliest tokens of this mass.
        seed: of this request's own draws: the same prompt, user and seed give the same answer in any batch.
    """

    max_new_tokens: int = 48
    temperature: float = 0.0
    top_p: float = 1.0
    seed: int = 0


@dataclass(frozen=True)
class Logprobs:
    """Log-probabilities (nats) at one token's place, by the model itself: temperature and top_p do not show.

    Attributes:
        own: of the token.
        likeliest: tokens and theirs, the likeliest first.
    """

    own: float
    likeliest: tuple[tuple[int, float], ...]


class Sampler:
    """One request's way from logits to tokens."""

    def __init__(self, sampling: Sampling) -> None:
        self.sampling = sampling
        self._generator: torch.Generator | None = None
        if sampling.temperature > 0:
            self._generator = torch.Generator().manual_seed(sampling.seed)

    @property
    def greedy(self) -> bool:
        """Whether the likeliest token is taken."""
        return self._generator is None

    def draw(self, logits: Float[Tensor, "V"]) -> int:
        """Draw a token by temperature and top_p, on the CPU: generators of devices differ. The largest is finite."""
        logits = logits.float().cpu()
        # Less than the largest, so that a temperature near 0 makes -inf of the others and never inf - inf.
        scores = ((logits - logits.max()).double() / self.sampling.temperature).float()
        if self.sampling.top_p < 1:
            scores = nucleus(scores, self.sampling.top_p)
        return int(torch.multinomial(scores.softmax(-1), 1, generator=self._generator))


def nucleus(scores: Float[Tensor, "V"], mass: float) -> Float[Tensor, "V"]:
    """Return scores with all but the likeliest tokens that together reach `mass` at -inf; the likeliest stays.

    Source: Holtzman et al. 2020, "The Curious Case of Neural Text Degeneration".
    """
    ordered, order = scores.sort()
    drop = ordered.softmax(-1).cumsum(-1) <= 1 - mass
    drop[-1] = False
    return scores.masked_fill(torch.zeros_like(drop).scatter(0, order, drop), -torch.inf)


def logprobs_of(logits: Float[Tensor, "V"], token: int, count: int) -> Logprobs:
    """Return a token's log-probability and the `count` likeliest; `LEAST` stands for -inf, which JSON lacks."""
    shares = logits.float().log_softmax(-1).nan_to_num(nan=LEAST, neginf=LEAST).clamp(min=LEAST).cpu()
    values, ids = shares.topk(min(count, len(shares)))
    return Logprobs(float(shares[token]), tuple(zip(ids.tolist(), values.tolist(), strict=True)))


def next_tokens(logits: Float[Tensor, "B V"], samplers: Sequence[Sampler]) -> list[int | Exception]:
    """Return one token per row, or why there is none in a row: what is wrong with one does not concern the others."""
    likeliest = logits.argmax(-1, keepdim=True)
    # A NaN counts as the largest, so this one number tells of NaNs and infinities in the whole row.
    finite: list[bool] = logits.gather(-1, likeliest).isfinite().flatten().tolist()
    found: list[int | Exception] = likeliest.flatten().tolist()
    for row, sampler in enumerate(samplers):
        if not finite[row]:
            found[row] = ProperError("the logits are not finite")
        elif not sampler.greedy:
            try:
                found[row] = sampler.draw(logits[row])
            except Exception as error:
                found[row] = error
    return found
