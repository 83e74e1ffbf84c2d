"""Sampling of next tokens (greedy, temperature, top_p) and log-probabilities, with parameters and a seed per row.

A row's draws come from a generator seeded by its request, so they do not depend on the other rows of the batch.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from numbers import Integral, Real

import torch
from jaxtyping import Float
from torch import Tensor

from proper.errors import InputError, ProperError

MIN_LOGPROB = -9999.0
"""Log-probability reported for impossible tokens; OpenAI's value for very unlikely ones."""


@dataclass(frozen=True)
class Sampling:
    """Sampling parameters of a request.

    Attributes:
        max_new_tokens: maximum tokens of the answer.
        temperature: sampling temperature; 0 is greedy decoding.
        top_p: nucleus sampling: draw among the likeliest tokens that together have this probability.
        seed: seed of this request's generator: the same prompt, user and seed give the same answer in any batch.

    Raises:
        InputError: a parameter is of another type, or beyond its range; the message names it.
    """

    max_new_tokens: int = 48
    temperature: float = 0.0
    top_p: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        _require("max_new_tokens", self.max_new_tokens, Integral, 1, math.inf)
        _require("temperature", self.temperature, Real, 0, sys.float_info.max)
        _require("top_p", self.top_p, Real, 0, 1)
        _require("seed", self.seed, Integral, -(2**63), 2**63 - 1)


def _require(name: str, value: object, kind: type, least: float, most: float) -> None:
    if not isinstance(value, kind) or isinstance(value, bool) or not least <= value <= most:  # type: ignore[operator]
        what = "a whole number" if kind is Integral else "a number"
        raise InputError(f"{name}: {value!r} is not {what} from {least} to {most:g}")


@dataclass(frozen=True)
class Logprobs:
    """Log-probabilities (nats) at one position, of the model itself: before temperature and top_p.

    Attributes:
        own: log-probability of the drawn token.
        likeliest: top tokens with their log-probabilities, the likeliest first.
    """

    own: float
    likeliest: tuple[tuple[int, float], ...]


class Sampler:
    """Sampler of one request, with its own random generator, which the first draw makes."""

    def __init__(self, sampling: Sampling) -> None:
        self.sampling = sampling
        self._generator: torch.Generator | None = None

    @property
    def greedy(self) -> bool:
        """Whether decoding is greedy."""
        return not self.sampling.temperature > 0

    def draw(self, logits: Float[Tensor, "V"]) -> int:
        """Draw a token by temperature and top_p, on the CPU: generators differ by device. The maximum is finite.

        Raises:
            RuntimeError: no generator takes the seed.
        """
        if self._generator is None:
            self._generator = torch.Generator().manual_seed(self.sampling.seed)
        logits = logits.float().cpu()
        # Relative to the maximum, so that a temperature near 0 turns the others into -inf and never gives inf - inf.
        scores = ((logits - logits.max()).double() / self.sampling.temperature).float()
        if self.sampling.top_p < 1:
            scores = nucleus(scores, self.sampling.top_p)
        return int(torch.multinomial(scores.softmax(-1), 1, generator=self._generator))


def nucleus(scores: Float[Tensor, "V"], mass: float) -> Float[Tensor, "V"]:
    """Return scores with -inf outside the nucleus: the likeliest tokens that together reach `mass`, at least one.

    Source: Holtzman et al. 2020, "The Curious Case of Neural Text Degeneration".
    """
    ordered, order = scores.sort()
    drop = ordered.softmax(-1).cumsum(-1) <= 1 - mass
    drop[-1] = False
    return scores.masked_fill(torch.zeros_like(drop).scatter(0, order, drop), -torch.inf)


def logprobs_of(logits: Float[Tensor, "V"], token: int, count: int) -> Logprobs:
    """Return a token's log-probability and the `count` largest; `MIN_LOGPROB` replaces -inf, which JSON lacks."""
    shares = logits.float().log_softmax(-1).nan_to_num(nan=MIN_LOGPROB, neginf=MIN_LOGPROB).clamp(min=MIN_LOGPROB).cpu()
    values, ids = shares.topk(min(count, len(shares)))
    return Logprobs(float(shares[token]), tuple(zip(ids.tolist(), values.tolist(), strict=True)))


def next_tokens(logits: Float[Tensor, "B V"], samplers: Sequence[Sampler]) -> list[int | Exception]:
    """Return the next token of each row, or the row's error: an error in one row does not affect the others."""
    likeliest = logits.argmax(-1, keepdim=True)
    # argmax treats NaN as the largest, so this value is finite only if the row has no NaN and no +inf.
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
